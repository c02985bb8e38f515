"""Turns texts into unit vectors. Knows nothing of documents, chunks or stores.

Contract: a text that is longer than the model reads is refused, never cut silently.
Limits: a vector depends a little on the texts it shares a batch with (padding; cosine ≥ .999 in bfloat16).
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stripedrag import hardware, weights
from stripedrag.errors import SetupError, StripedragError, UsageError, said

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

BATCH_TEXTS = 32
MINILM = "all-MiniLM-L6-v2"
_CLS, _SEP = 101, 102  # of MiniLM, whose padding is 0
_AS_TENSOR = {"convert_to_tensor": True, "show_progress_bar": False}
# Of a model on the hub: other forms of the same weights, and code, which is not run.
_NOT_LOADED = ["pytorch_model*.bin", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "onnx/*", "openvino/*", "*.py"]
_OWN = ("_folder", "_model", "sha256", "tokenizer")  # what each copy of an embedder finds for itself


class Embedder(Protocol):
    """What an index asks of an embedder. `name`, `sha256` and `dimension` go into its manifest and must match on open.

    Building one should be cheap (an index opens with it); load the model at the first `embed`.
    """

    @property
    def name(self) -> str:
        """The name under which the field knows the model."""

    @property
    def sha256(self) -> str:
        """Hexadecimal sha256 of the weights; what else vectors depend on (tokenizer, prompts, pooling) is not in it."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    @property
    def max_tokens(self) -> int:
        """How many wordpieces a text may have, special tokens not counted."""

    @property
    def tokenizer(self) -> "Tokenizer":
        """The model's own tokenizer, set to neither truncate nor pad."""

    def embed(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> "NDArray[np.float32]":
        """Unit vectors (len(texts), dimension) of passages, in their order.

        `progress` is called with the number of texts done since its last call. Raises `UsageError` for a text that has
        more than `max_tokens`.
        """

    def embed_query(self, query: str) -> "NDArray[np.float32]":
        """The unit vector (dimension,) of a query. Raises `UsageError` where it has more than `max_tokens`."""


class SentenceTransformerEmbedder:
    """Any model of sentence-transformers: a folder, or an id of the model hub, whose files are fetched where missing.

    `device` None takes the first CUDA device or else the CPU; `dtype` None takes what is fast there, bfloat16 or
    float32. The prompts that the model declares for queries and documents are used. `dimension` and `max_tokens` may be
    given where they are known: an index then opens without loading the model. Raises `SetupError` where the model
    cannot be had or loaded, has a part only as a pickle, or needs code of its own, and `UsageError` where what was
    given is not the model's.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        name: str | None = None,
        dimension: int | None = None,
        max_tokens: int | None = None,
        device: str | None = None,
        dtype: "torch.dtype | None" = None,
    ) -> None:
        self._source = str(Path(model).resolve()) if is_folder(model) else str(model)
        self.name = self._source if name is None else name
        self._dimension, self._max_tokens = dimension, max_tokens
        self._device, self._dtype = device, dtype

    def __getstate__(self) -> dict[str, Any]:
        """Without the model: who gets a copy, in another process or on another machine, loads its own."""
        return {name: value for name, value in vars(self).items() if name not in _OWN}

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal sha256 of the weights that are loaded, of all their files where there are several."""
        files = self._weight_files()
        if len(files) == 1:
            return weights.sha256(files[0])
        told = "".join(f"{file.relative_to(self._folder).as_posix()} {weights.sha256(file)}\n" for file in files)
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        if self._dimension is None:
            self._dimension = int(self._model.encode_query([""], **_AS_TENSOR).shape[1])
        return self._dimension

    @property
    def max_tokens(self) -> int:
        """What the model reads at once, less its special tokens and the longer of its prompts."""
        if self._max_tokens is None:
            self._max_tokens = self._read_at_once(self._model)
        return self._max_tokens

    def _read_at_once(self, model: Any) -> int:
        if not isinstance(model.max_seq_length, int):
            raise SetupError(
                f"{self.name} does not say how many tokens it reads (max_seq_length is {model.max_seq_length}). Set it "
                f"in the model's sentence_bert_config.json."
            )
        taken = self.tokenizer.num_special_tokens_to_add(is_pair=False)
        prompts = [len(self.tokenizer.encode(p, add_special_tokens=False)) for p in model.prompts.values()]
        return model.max_seq_length - taken - max(prompts, default=0)

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The model's tokenizer, which neither truncates nor pads.

        A copy of its own: sentence-transformers sets truncation on the one it holds with every call.
        """
        from tokenizers import Tokenizer

        file = self._folder / "tokenizer.json"
        with _loading(self._folder):
            if file.is_file():
                tokenizer = Tokenizer.from_file(str(file))
            else:
                tokenizer = Tokenizer.from_str(self._model.tokenizer.backend_tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def embed(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> "NDArray[np.float32]":
        """Unit vectors (len(texts), dimension) of passages, in their order; see `Embedder.embed`."""
        import numpy as np

        tokens = self._tokens(texts)
        lengths = [len(ids) for ids in tokens]
        for position, length in enumerate(lengths):
            if length > self.max_tokens:
                raise UsageError(
                    f"text {position} of {len(texts)} has {length} wordpieces; {self.name} reads {self.max_tokens}. "
                    f"Cut it into chunks first."
                )
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        # Texts of like length share a batch, so that little of it is padding.
        order = np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable")[::-1]
        for first in range(0, len(texts), BATCH_TEXTS):
            batch = order[first : first + BATCH_TEXTS]
            vectors[batch] = self._unit(self._encoded([texts[i] for i in batch], [tokens[i] for i in batch]))
            if progress is not None:
                progress(len(batch))
        return vectors

    def embed_query(self, query: str) -> "NDArray[np.float32]":
        """The unit vector (dimension,) of a query; see `Embedder.embed_query`."""
        (tokens,) = self._tokens([query])
        if len(tokens) > self.max_tokens:
            raise UsageError(
                f"the query has {len(tokens)} wordpieces; {self.name} reads {self.max_tokens}. Ask a shorter question."
            )
        vector: NDArray[np.float32] = self._unit(self._model.encode_query([query], **_AS_TENSOR))[0]
        return vector

    def _tokens(self, texts: Sequence[str]) -> "list[NDArray[np.int32]]":
        """The ids of each text, without special tokens."""
        import numpy as np

        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _encoded(self, texts: list[str], tokens: "list[NDArray[np.int32]]") -> "torch.Tensor":
        """The model's vectors of passages, of which the ids are known, too."""
        encoded: torch.Tensor = self._model.encode_document(texts, batch_size=len(texts), **_AS_TENSOR)
        return encoded

    def _unit(self, embeddings: "torch.Tensor") -> "NDArray[np.float32]":
        """Normalises in float32: in bfloat16 a vector's norm is off by up to .004."""
        import torch

        if self._dimension not in (None, embeddings.shape[1]):
            raise UsageError(
                f"the vectors of {self.name} have {embeddings.shape[1]} numbers, not {self._dimension}. Give that "
                f"dimension, or none."
            )
        return torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()

    @cached_property
    def _folder(self) -> Path:
        if is_folder(self._source):
            return Path(self._source)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        with suppress(HFValidationError, LocalEntryNotFoundError, OSError):  # what is there stays as it is
            if any((there := Path(snapshot_download(self._source, local_files_only=True))).glob("*.safetensors")):
                return there
        try:
            return Path(snapshot_download(self._source, ignore_patterns=_NOT_LOADED))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise SetupError(
                f"the embedder {self._source!r} is no folder and cannot be had from the model hub "
                f"({type(error).__name__}). Check the name and the network, or give a folder of sentence-transformers."
            ) from error

    def _weight_files(self) -> list[Path]:
        """What is loaded: the safetensors of the folder and of the parts that it declares."""
        declared = self._folder / "modules.json"
        with _loading(self._folder):
            parts = json.loads(declared.read_bytes()) if declared.is_file() else []
            folders = sorted({self._folder, *(self._folder / part["path"] for part in parts)})
        found = {folder: sorted(folder.glob("*.safetensors")) for folder in folders}
        pickled = [folder for folder in folders if not found[folder] and any(folder.glob("*.bin"))]
        if pickled or not any(found.values()):
            raise SetupError(
                f"{(pickled or folders)[0]} holds no *.safetensors file, and a pickle is never loaded. Convert the "
                f"model to it."
            )
        return [file for files in found.values() for file in files]

    @cached_property
    def _model(self) -> Any:
        model = self._load(self._dtype)
        if self._max_tokens is not None and self._max_tokens > (most := self._read_at_once(model)):
            raise UsageError(f"max_tokens is {self._max_tokens}; {self.name} reads {most}. Give that, or none.")
        return model

    def _load(self, dtype: "torch.dtype | None") -> Any:
        import torch
        from sentence_transformers import SentenceTransformer

        self._weight_files()  # tells where there is nothing but a pickle
        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        options = {"dtype": dtype or hardware.fast_dtype(device), "use_safetensors": True}
        with _loading(self._folder):
            return SentenceTransformer(str(self._folder), device=device, local_files_only=True, model_kwargs=options)


class MiniLMEmbedder(SentenceTransformerEmbedder):
    """all-MiniLM-L6-v2 from the weights on this machine: 384 dimensions, at most 254 wordpieces.

    `dtype` None: the cosine between bfloat16 and float32 is ≥ .998, so an index built in one can be searched in the
    other. Raises `SetupError` where the weights are missing.
    """

    def __init__(self, *, device: str | None = None, dtype: "torch.dtype | None" = None) -> None:
        super().__init__(
            weights.find(weights.MINILM).parent,
            name=MINILM,
            dimension=384,
            max_tokens=254,  # 256 less [CLS] and [SEP]; the model itself would cut the rest away without a word
            device=device,
            dtype=dtype,
        )

    def _encoded(self, texts: list[str], tokens: "list[NDArray[np.int32]]") -> "torch.Tensor":
        """From the tokens that were counted: to tokenize anew costs a twentieth of the time."""
        import numpy as np
        import torch

        lengths = np.array([len(own) + 2 for own in tokens])
        ids = np.zeros((len(tokens), lengths.max()), dtype=np.int64)
        ids[:, 0] = _CLS
        for row, own in enumerate(tokens):
            ids[row, 1 : len(own) + 1] = own
        ids[np.arange(len(ids)), lengths - 1] = _SEP
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        of_model = {"input_ids": ids, "attention_mask": mask}
        features = {name: torch.from_numpy(array).to(self._model.device) for name, array in of_model.items()}
        with torch.inference_mode():
            encoded: torch.Tensor = self._model(features)["sentence_embedding"]
        return encoded

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy takes the weights of the machine that it is on."""
        vars(self).update(state, _source=str(weights.find(weights.MINILM).parent))


class OnnxEmbedder(SentenceTransformerEmbedder):
    """A model of sentence-transformers, its transformer run by ONNX Runtime on an export (stripedrag[onnx]).

    `file` is the `.onnx` file, in the folder of the model that it was exported from, weights and all, or in a folder
    within, as the model hub keeps them; its path is the embedder's name unless `name` is given. It runs on the first
    CUDA device where ONNX Runtime has it, or else on the CPU. Loading it compares its vectors with the model's own.
    Raises `SetupError` where there is no such file, no model around it, no ONNX Runtime, or it gives other vectors.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        name: str | None = None,
        dimension: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        # No link is followed: the hub's cache keeps links to files that have no names.
        file = Path(os.path.normpath(Path(file).absolute()))
        if file.suffix != ".onnx" or not file.is_file():
            raise SetupError(f"there is no .onnx file {file}. Give that of a model of sentence-transformers.")
        folder = next((folder for folder in file.parents[:2] if (folder / "modules.json").is_file()), None)
        if folder is None:
            raise SetupError(
                f"{file} lies in no folder of sentence-transformers: there is no modules.json beside it or above it. "
                f"Put it into the folder of the model that it was exported from."
            )
        super().__init__(
            folder, name=str(file) if name is None else name, dimension=dimension, max_tokens=max_tokens, device="cpu"
        )
        self._file = file

    def _weight_files(self) -> list[Path]:
        beside = sorted(self._file.parent.glob(f"{glob.escape(self._file.name)}*"))  # with the tensors of a large one
        return [*super()._weight_files(), *beside]

    def _load(self, dtype: "torch.dtype | None") -> Any:
        import torch

        from stripedrag.indexes.onnx_model import run_by

        model = super()._load(torch.float32)
        run_by(self._file, model)
        return model


def embedder_named(name: str, *, dimension: int | None = None) -> Embedder:
    """The embedder that an index was made with, by the name in its manifest; with its dimension no model is loaded."""
    if name == MINILM:
        return MiniLMEmbedder()
    if name.endswith(".onnx") and not is_folder(name):
        return OnnxEmbedder(name, dimension=dimension)
    return SentenceTransformerEmbedder(name, dimension=dimension)


def is_folder(path: str | Path) -> bool:
    """Whether `path` is a folder. Raises `SetupError` for an empty one and for what the system cannot look up."""
    if not str(path):
        raise SetupError("the embedder's name is empty; give a folder, an id of the model hub or an .onnx file")
    try:
        return Path(path).is_dir()
    except OSError as error:
        raise SetupError(
            f"the embedder {str(path)!r} cannot be looked up: {error.strerror}. Check its path."
        ) from error


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """What any library says of a broken model, told with its folder."""
    try:
        yield
    except StripedragError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and json share no class
        raise SetupError(
            f"{folder} cannot be loaded as a model of sentence-transformers: {said(error)}. Get it anew, or another."
        ) from error

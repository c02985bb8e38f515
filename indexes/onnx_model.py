"""A model of sentence-transformers whose transformer is an ONNX export. Imported only where one is embedded with.

The export takes the transformer's place; what follows it, pooling and the rest, is what the model's folder declares.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.util import import_from_string
from transformers import AutoTokenizer

from stripedrag.errors import SetupError

_OURS = "sentence_transformers."  # a module of another package would run code that came with a model


def load(folder: Path, file: Path) -> SentenceTransformer:
    """The model in `folder` with the export `file` in its transformer's place.

    Raises `SetupError` without ONNX Runtime, and where `file` is no export of a transformer, the model is not one
    transformer with what follows it, or brings code of its own.
    """
    first, *others = json.loads((folder / "modules.json").read_text())
    foreign = [entry["type"] for entry in (first, *others) if not entry["type"].startswith(_OURS)]
    if foreign or first["path"] or not first["type"].endswith(".Transformer"):
        told = f"brings modules of its own ({', '.join(foreign)})" if foreign else f"begins with {first['type']}"
        raise SetupError(f"the model in {folder} {told}; by ONNX only one transformer and what follows it can be run")
    following = [import_from_string(entry["type"]).load(str(folder), subfolder=entry["path"]) for entry in others]
    if not all(getattr(module, "include_prompt", True) for module in following):
        raise SetupError(
            f"the model in {folder} pools without its prompts, which is not done by ONNX here. Run it by torch."
        )
    settings = _json(folder / "config_sentence_transformers.json")
    length = _json(folder / "sentence_bert_config.json").get("max_seq_length")
    return SentenceTransformer(
        modules=[OnnxTransformer(folder, file, length), *following],
        device="cpu",  # of what follows; the export itself runs where ONNX Runtime can
        prompts=settings.get("prompts"),
        default_prompt_name=settings.get("default_prompt_name"),
    )


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.is_file() else {}


class OnnxTransformer(InputModule):
    """Token embeddings by ONNX Runtime: `token_embeddings`, the export's first output, (texts, tokens, width).

    `max_seq_length` None is what the tokenizer says.
    """

    def __init__(self, folder: Path, file: Path, max_seq_length: int | None) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.max_seq_length = max_seq_length or self.tokenizer.model_max_length
        self._session = _session(file)
        self._inputs = [one.name for one in self._session.get_inputs()]
        output = self._session.get_outputs()[0]
        given = self.tokenizer.model_input_names
        if not {*self._inputs} <= {*given} or len(output.shape) != 3:
            raise SetupError(
                f"{file} takes {', '.join(self._inputs)} and gives {output.name} of {len(output.shape)} axes; the "
                f"export of a transformer takes what its tokenizer gives ({', '.join(given)}) and gives embeddings "
                f"(texts, tokens, width). Export the model anew."
            )
        self._output = output.name

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Tokens of the texts, each behind the prompt, padded to the longest."""
        texts = [(prompt or "") + text for text in inputs]
        features = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt"
        )
        return dict(features)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The features with `token_embeddings`."""
        fed = {name: features[name].numpy() for name in self._inputs}
        (embeddings,) = self._session.run([self._output], fed)
        return features | {"token_embeddings": torch.from_numpy(embeddings)}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Refused: an export is kept where it is."""
        raise NotImplementedError("a model that runs by ONNX is not saved; copy its folder")


def _session(file: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise SetupError("to embed by ONNX install ONNX Runtime: pip install 'stripedrag[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    available = onnxruntime.get_available_providers()
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=[one for one in wanted if one in available])
    except Exception as error:  # ONNX Runtime's errors share no class of their own
        raise SetupError(f"{file} cannot be read by ONNX Runtime: {str(error).splitlines()[0]}") from error

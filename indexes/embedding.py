"""Turns texts into unit vectors. Knows nothing of documents, chunks or stores.

Contract: a text that is longer than the model reads is refused, never cut silently.
Limits: a vector depends a little on the texts it shares a batch with (padding; cosine ≥ .999 in bfloat16).
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from stripedrag import hardware, weights
from stripedrag.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

BATCH_TEXTS = 32


class Embedder(Protocol):
    """What an index asks of an embedder. `name`, `sha256` and `dimension` go into its manifest and must match on open.

    Building one should be cheap (an index opens with it); load the model at the first `embed`.
    """

    @property
    def name(self) -> str:
        """The name under which the field knows the model."""

    @property
    def sha256(self) -> str:
        """Hexadecimal sha256 of the weights: two embedders with the same one give the same vectors."""

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


class MiniLMEmbedder:
    """all-MiniLM-L6-v2 from the weights on this machine: 384 dimensions, at most 254 wordpieces.

    `device` None takes the first CUDA device or else the CPU; `dtype` None takes what is fast there, bfloat16 or
    float32 (cosine between the two ≥ .998: an index built in one can be searched in the other). Raises `SetupError`
    where the weights are missing.
    """

    name = "all-MiniLM-L6-v2"
    dimension = 384
    max_tokens = 254  # 256 less [CLS] and [SEP]; the model itself would cut the rest away without a word

    def __init__(self, *, device: str | None = None, dtype: "torch.dtype | None" = None) -> None:
        self._path = weights.find(weights.MINILM)
        self._device = device
        self._dtype = dtype

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal sha256 of the weights that are loaded."""
        return weights.sha256(self._path)

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The model's tokenizer, which neither truncates nor pads.

        A copy of its own: sentence-transformers sets truncation on the one it holds with every call.
        """
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._path.with_name("tokenizer.json")))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def embed(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> "NDArray[np.float32]":
        """Unit vectors (len(texts), 384) of passages, in their order; see `Embedder.embed`."""
        import numpy as np

        lengths = self._lengths(texts)
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
            vectors[batch] = self._encode([texts[position] for position in batch])
            if progress is not None:
                progress(len(batch))
        return vectors

    def embed_query(self, query: str) -> "NDArray[np.float32]":
        """The unit vector (384,) of a query; see `Embedder.embed_query`."""
        (length,) = self._lengths([query])
        if length > self.max_tokens:
            raise UsageError(
                f"the query has {length} wordpieces; {self.name} reads {self.max_tokens}. Ask a shorter question."
            )
        vector: NDArray[np.float32] = self._encode([query])[0]
        return vector

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding) for encoding in encodings]

    def _encode(self, texts: list[str]) -> "NDArray[np.float32]":
        """Normalises in float32: in bfloat16 a vector's norm is off by up to .004."""
        import torch

        embeddings: torch.Tensor = self._model.encode(
            texts, batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False
        )
        return torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()

    @cached_property
    def _model(self) -> Any:
        import torch
        from sentence_transformers import SentenceTransformer

        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = self._dtype or hardware.fast_dtype(device)
        model = SentenceTransformer(
            str(self._path.parent), device=device, local_files_only=True, model_kwargs={"dtype": dtype}
        )
        model.max_seq_length = self.max_tokens + 2
        return model

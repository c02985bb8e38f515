"""A model of sentence-transformers whose transformer runs by ONNX Runtime. Imported only where one is embedded with.

Tokenizing, prompts, pooling and whatever else the model declares stay those of sentence-transformers.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from stripedrag.errors import SetupError, said

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_PROBES = ["A cat.", "many words " * 10]  # of such a pair one is padded, which shows what an export does with a mask
_ANEW = "Export that model anew, for texts of any number and length, every input from an example of its own."
_LEAST_COSINE = 0.95  # low enough for 8-bit exports; one that took the mask for the tokens had .04


def run_by(file: Path, model: "SentenceTransformer") -> None:
    """Lets the ONNX export `file` compute what `model`'s transformer does, from now on.

    Raises `SetupError` without ONNX Runtime, where `file` is no export that it can run, and where the vectors of some
    texts are others than the model's own.
    """
    expected = _probed(model)
    export = _Export(file)
    try:
        cast(Any, model[0]).auto_model.forward = export
        found = _probed(model)
        cosine = torch.nn.functional.cosine_similarity(found, expected).min().item()
    except SetupError:
        raise
    except Exception as error:  # of any library, of a model that is no transformer or of another size
        raise SetupError(
            f"{file} cannot do what the model in whose folder it lies does: {said(error)}. {_ANEW}"
        ) from error
    if not cosine >= _LEAST_COSINE:
        raise SetupError(
            f"{file} gives vectors of cosine {cosine:.3f} with those of the model in whose folder it lies; the limit "
            f"is {_LEAST_COSINE}. {_ANEW}"
        )


def _probed(model: "SentenceTransformer") -> torch.Tensor:
    """The vectors of texts that come together and of one that comes alone."""
    return torch.cat([model.encode(texts, convert_to_tensor=True) for texts in (_PROBES, _PROBES[:1])])


class _Export:
    """The `forward` of a transformer, by its export; of its outputs `last_hidden_state` is what is so called."""

    def __init__(self, file: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise SetupError("to embed by ONNX install ONNX Runtime: pip install 'stripedrag[onnx]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        available = onnxruntime.get_available_providers()
        providers = [provider for provider in wanted if provider in available]
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors share no class of their own
            raise SetupError(f"{file} cannot be read by ONNX Runtime: {said(error)}. {_ANEW}") from error
        if "last_hidden_state" not in (outputs := [one.name for one in self._session.get_outputs()]):
            raise SetupError(f"{file} gives {', '.join(outputs)} and no last_hidden_state. {_ANEW}")
        self._file, self._outputs = file, outputs
        self._inputs = [one.name for one in self._session.get_inputs()]

    def __call__(self, **features: Any) -> dict[str, torch.Tensor]:
        """The export's outputs by their names, for tensors by theirs. Raises `SetupError` where it cannot run."""
        if missing := [name for name in self._inputs if name not in features]:
            raise SetupError(f"{self._file} takes {', '.join(missing)}, which the tokenizer does not give. {_ANEW}")
        given = {name: features[name].numpy() for name in self._inputs}
        try:
            found = self._session.run(self._outputs, given)
        except Exception as error:  # ONNX Runtime's errors share no class of their own
            shape = " x ".join(map(str, given[self._inputs[0]].shape))
            raise SetupError(f"{self._file} cannot run on {shape} tokens: {said(error)}. {_ANEW}") from error
        return {name: torch.from_numpy(value).float() for name, value in zip(self._outputs, found, strict=True)}

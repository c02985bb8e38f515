"""What a teacher says of windows: its likeliest next tokens at every position of text, kept on disk."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from stripedrag.files import written_whole
from stripedrag.kernels import cpu
from stripedrag.model.striping.data import ANSWER, TEXT, Windows
from stripedrag.model.striping.families import striped_config, transformer_digest
from stripedrag.model.striping.loss import ROWS, Targets

LIKELIEST = 64  # tokens whose probability is kept; the others' is kept as a sum


class Teacher:
    """A frozen model and the folder of what it said, by the ids that it read; `key` tells models apart.

    A round of the same windows, or a rival trained on them, then costs no forward pass: 384 bytes a token. The model
    is asked window by window, so that what it says does not depend on which of them it was asked before.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model, self._folder = model, folder
        folder.mkdir(parents=True, exist_ok=True)
        config = striped_config(model.config, model.state_dict(), (), modes=1, taps=1)  # all that its numbers depend on
        of_versions = ("transformers_version", "dtype")
        said = sorted(item for item in config.to_dict().items() if item[0] not in of_versions)
        dtype = unembedding(model).dtype
        content = f"{transformer_digest(model, dtype)} {dtype} {said} {LIKELIEST}"
        self.key = hashlib.sha256(content.encode()).digest()

    def targets(self, windows: Windows, *, answer_weight: float, text_labels: float = 0.0) -> Targets:
        """What each predicted position of `windows` is to be, in the order of `predicted`.

        Text has the teacher's distribution, with a share of `text_labels` moved to the token that comes, and weight 1;
        an answer has its label and `answer_weight`.
        """
        ids, kinds = windows.ids.long(), windows.kinds
        wanted = kinds[:, 1:][predicted(windows)]
        is_text = wanted == TEXT
        tokens = torch.zeros(len(wanted), LIKELIEST, dtype=torch.int64)
        probabilities = torch.zeros(len(wanted), LIKELIEST)
        if is_text.any():
            tokens[is_text], probabilities[is_text] = self._said(windows)
        labels = ids[:, 1:][predicted(windows)]
        if text_labels:
            _move_to(labels, tokens, probabilities, text_labels)
        tokens[~is_text, 0] = labels[~is_text]
        probabilities[~is_text] = F.one_hot(torch.tensor(0), LIKELIEST).float()
        weights = torch.where(is_text, 1.0, answer_weight)
        return Targets(tokens, probabilities, weights)

    def _said(self, windows: Windows) -> tuple[Tensor, Tensor]:
        windows = windows.at((windows.kinds[:, 1:] == TEXT).any(1))
        known = [self._said_of(windows.at([i])) for i in range(len(windows.ids))]
        ids, probabilities = (torch.cat([one[name] for one in known]) for name in ("ids", "probabilities"))
        return ids.long(), probabilities.float()

    def _said_of(self, window: Windows) -> dict[str, Tensor]:
        path = self._path(*window)
        count = int((window.kinds[:, 1:] == TEXT).sum())
        if (kept := _read(path, count, self.model.config.vocab_size)) is not None:
            return kept
        ids, probabilities = self.ask(window)
        said = {"ids": ids.int().contiguous(), "probabilities": probabilities.half().contiguous()}
        with written_whole(path, by_many=True) as scratch:
            save_file(said, scratch)
        return said

    def _path(self, ids: Tensor, kinds: Tensor) -> Path:
        content = self.key + ids.numpy().tobytes() + kinds.numpy().tobytes()
        return self._folder / f"{hashlib.sha256(content).hexdigest()[:24]}.safetensors"

    @torch.no_grad()
    def ask(self, windows: Windows) -> tuple[Tensor, Tensor]:
        """The likeliest tokens after each position of text, ids and probabilities (R, K), kept nowhere."""
        device = self.model.device
        hidden = self.model.base_model(windows.ids.long().to(device), use_cache=False).last_hidden_state
        rows = hidden[:, :-1][(windows.kinds[:, 1:] == TEXT).to(device)]
        said = [likeliest(part @ unembedding(self.model).T, LIKELIEST) for part in rows.split(ROWS)]
        return torch.cat([ids for ids, _ in said]).cpu(), torch.cat([p for _, p in said]).cpu()


def _read(path: Path, count: int, vocabulary: int) -> dict[str, Tensor] | None:
    """What was said at `count` positions, or None where the file is not there or not what it should be."""
    try:
        said = load_file(path)
        ids, probabilities = said["ids"], said["probabilities"]
    except (OSError, SafetensorError, KeyError):
        return None
    if not ids.shape == probabilities.shape == (count, LIKELIEST):
        return None
    are_ids = (ids >= 0) & (ids < vocabulary)
    are_probabilities = (probabilities >= 0) & (probabilities.float().sum(1, keepdim=True) < 1.01)  # no NaN either
    return said if bool((are_ids & are_probabilities).all()) else None


def _move_to(labels: Tensor, tokens: Tensor, probabilities: Tensor, share: float) -> None:
    """Mix each row with its label; one that is not among the likeliest takes the place of the last of them."""
    is_label = tokens == labels.unsqueeze(1)
    is_label &= is_label.cumsum(1) == 1  # the id that fills a small vocabulary up comes again
    absent = ~is_label.any(1)
    tokens[absent, -1], probabilities[absent, -1], is_label[absent, -1] = labels[absent], 0.0, True
    probabilities.mul_(1 - share).add_(is_label, alpha=share)


def predicted(windows: Windows) -> Tensor:
    """(W, L - 1) bool: the positions whose next token counts."""
    return (windows.kinds[:, 1:] == TEXT) | (windows.kinds[:, 1:] == ANSWER)


def unembedding(model: PreTrainedModel) -> Tensor:
    """The model's (V, H) matrix from states to logits, in a dtype that the device multiplies."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight.float() if cpu.lacks_products(weight) else weight


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row of logits (R, V), and their probabilities, (R, count) float32.

    A vocabulary of fewer tokens is filled up with token 0 of probability 0.
    """
    kept = logits.float().softmax(-1).topk(min(count, logits.shape[1]), dim=-1)
    missing = (0, count - kept.values.shape[1])
    return F.pad(kept.indices, missing), F.pad(kept.values, missing)

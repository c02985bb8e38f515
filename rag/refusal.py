"""When an answer is that the documents do not hold one.

Striping teaches a model to say so where the passages lack the answer, but greedily it says it too rarely: it is unsure
of those answers, and the likeliest words are some name all the same. The probability that it gives to the beginning of
the refusal tells the two apart, and it stands in the logits that the prompt was read for: asking costs nothing.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stripedrag.errors import UsageError
from stripedrag.model.striping.data import REFUSAL
from stripedrag.rag.prompt import PromptFormat
from stripedrag.rag.prompt_template import default_template

if TYPE_CHECKING:
    from torch import Tensor

# By model, the least probability of the refusal's first token that makes an answer one. Chosen on 112 questions with
# and without their documents in 1,024 tokens: it refused 2 % of the first and 71 % of the second, and the model's own
# words did 0 and 29 % (docs/LOG.md). Weights of 8 bits refuse alike; those of 4 refuse, from there on, every third of
# the first, so theirs is not named. What is not named refuses by its own words alone.
REFUSE_ABOVE = {("stripedhyena-smol-135m", None): 0.005, ("stripedhyena-smol-135m", 8): 0.005}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer of `text`, as tokens `ids`, in any other's place where the first of them is as probable as `above`."""

    text: str
    ids: tuple[int, ...]
    above: float

    def holds(self, logits: "Tensor") -> bool:
        """Whether it is the answer, by the logits (1, V) of the first token."""
        return bool(logits[0].float().softmax(-1)[self.ids[0]] >= self.above)


def refusal_for(
    model_name: str, prompt: PromptFormat, above: float | None = None, *, bits: int | None = None
) -> Refusal | None:
    """How a model with weights of so many `bits` (None: as it is) refuses, from the probability `above` on (None: its
    own in `REFUSE_ABOVE`, which holds for the default prompt alone); None where it is 1.

    Raises `UsageError` for a probability outside (0, 1].
    """
    if above is None:
        above = REFUSE_ABOVE.get((model_name, bits), 1.0) if prompt.template == default_template() else 1.0
    if not 0 < above <= 1:
        raise UsageError(
            f"refuse_above is {above}; it is a probability above 0, and 1 leaves a refusal to the model's own words"
        )
    return None if above == 1 else Refusal(REFUSAL, tuple(prompt.encode(f" {REFUSAL}")), above)


def is_refusal(text: str) -> bool:
    """Whether an answer's text is the refusal."""
    return text.strip().rstrip(".").lower() == REFUSAL

"""An answer is that the documents hold none where the model says so, or thinks it probable enough."""

from itertools import pairwise

import pytest
import torch

from stripedrag.errors import UsageError
from stripedrag.model.cache import new_cache
from stripedrag.model.generation import prefill
from stripedrag.model.smollm2 import STRIPED
from stripedrag.rag import Pipeline
from stripedrag.rag.prompt import PromptFormat
from stripedrag.rag.prompt_template import PromptTemplate
from stripedrag.rag.refusal import REFUSE_ABOVE, is_refusal, refusal_for


def first_probability(pipeline, question, context, token):
    ids = pipeline.prompt.ids(question, context.spans)
    logits = prefill(pipeline.model, torch.tensor([ids]), new_cache(pipeline.model.config))
    return float(logits[0].softmax(-1)[token])


@pytest.fixture
def strict(index, tiny_model, tokenizer):
    """As the pipeline, with a refusal for some of the questions below and none for the others."""

    def make(above):
        return Pipeline(index, tiny_model, tokenizer, model_name="tiny", refuse_above=above)

    return make


def test_it_refuses_from_its_probability_on_alone_and_together(pipeline, strict):
    questions = [f"Who discovered oxygen, attempt {n}?" for n in range(6)]
    context = pipeline.context_for(questions, 900, answer_tokens=8)
    token = pipeline.prompt.encode(" not in the documents")[0]
    given = [first_probability(pipeline, question, context, token) for question in questions]
    ordered = sorted(given)
    gap, low = max((high - low, low) for low, high in pairwise(ordered))
    middle = low + gap / 2
    asked = strict(middle)
    alone = [asked.ask(question, context=context, answer_tokens=8) for question in questions]
    together = asked.ask_many(questions, context=context, answer_tokens=8)
    plain = pipeline.ask_many(questions, context=context, answer_tokens=8)
    for one, other, unasked, probability in zip(alone, together, plain, given, strict=True):
        if probability > middle:
            assert one.text == "not in the documents" and not one.found and one.citations == ()
            assert one.finish == "stop" and one.usage.answer_tokens < 8
        else:
            assert one.text == unasked.text and one.found
        assert (one.text, one.found) == (other.text, other.found)
    assert len({one.found for one in together}) == 2
    everything = strict(1e-9).ask_many(questions, context=context, answer_tokens=8)
    assert {one.text for one in everything} == {"not in the documents"}
    for limits in (dict(answer_tokens=2), dict(answer_tokens=8, stop=[" the"])):  # a refusal is whole
        cut = strict(1e-9).ask_many(questions, context=context, **limits)
        cut.append(strict(1e-9).ask(questions[0], context=context, **limits))
        assert {(one.text, one.found, one.citations, one.finish) for one in cut} == {
            ("not in the documents", False, (), "stop")
        }
        assert all(one.usage.answer_tokens <= limits["answer_tokens"] for one in cut)


def test_a_model_that_was_not_measured_refuses_by_its_own_words(pipeline, tokenizer):
    assert pipeline.refusal is None
    assert refusal_for("tiny", pipeline.prompt) is None
    for bits, above in ((None, REFUSE_ABOVE[STRIPED, None]), (8, REFUSE_ABOVE[STRIPED, 8])):
        assert refusal_for(STRIPED, pipeline.prompt, bits=bits).above == above
    assert refusal_for(STRIPED, pipeline.prompt, bits=4) is None
    assert refusal_for(STRIPED, pipeline.prompt, 1.0) is None
    other = PromptFormat(tokenizer, template=PromptTemplate(passage="{text}", question="{question}"))
    assert refusal_for(STRIPED, other) is None, "it was measured with the default words"
    for text, said in (("Not in the documents.", True), (" not in the documents", True), ("not in the city", False)):
        assert is_refusal(text) is said


@pytest.mark.parametrize("above", [0.0, -1.0, 1.5])
def test_what_is_no_probability_is_told(above, index):
    with pytest.raises(UsageError, match=f"refuse_above is {above}; it is a probability above 0, and 1 leaves"):
        Pipeline.open(index, refuse_above=above)


@pytest.mark.weights
def test_the_default_model_knows_what_the_documents_lack(default_pipeline):
    asked = {
        "When was the Warsaw Uprising?": True,
        "Who discovered oxygen?": True,
        "Who painted the Mona Lisa?": False,
        "How many moons does Jupiter have?": False,
    }
    found = {question: default_pipeline.ask(question, 1024).found for question in asked}
    assert sum(found[question] == there for question, there in asked.items()) >= 3
    assert found["When was the Warsaw Uprising?"]

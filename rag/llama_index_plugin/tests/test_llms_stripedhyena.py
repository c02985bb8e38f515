"""The integration is installed under LlamaIndex's names, and its classes are what LlamaIndex takes."""

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.llms.stripedhyena import FillContext, StripedHyena


def test_its_classes_are_those_that_llama_index_takes():
    assert issubclass(StripedHyena, BaseLLM)
    assert issubclass(FillContext, BaseSynthesizer)
    assert StripedHyena.class_name() == "StripedHyena"

"""Each metric against cases worked out by hand from the definitions of its source."""

import pytest

from stripedrag.eval.metrics import METRICS, normalized


@pytest.mark.parametrize(
    "metric,prediction,references,expected",
    [
        # RULER: string_match_all is the share of references found, string_match_part whether any is; case aside.
        ("string_match_all", "The numbers are 123 and 456.", ["123", "456"], 1.0),
        ("string_match_all", "only 123", ["123", "456"], 0.5),
        ("string_match_all", "none", ["123", "456"], 0.0),
        ("string_match_all", "PARIS", ["paris"], 1.0),
        ("string_match_all", "12345", ["234"], 1.0),  # a substring counts, inside a word too
        ("string_match_all", "\x00a\x01b\x02", ["a\nb"], 1.0),  # control characters are line breaks
        ("string_match_part", "only 123", ["123", "456"], 1.0),
        ("string_match_part", "Denver Broncos won", ["denver broncos", "Broncos"], 1.0),
        ("string_match_part", "neither", ["123", "456"], 0.0),
        # SQuAD 1.1: lower case, no punctuation, no articles, single spaces; the best reference counts.
        ("exact_match", "The  Cat!", ["a cat"], 1.0),
        ("exact_match", "cats", ["cat", "cats"], 1.0),
        ("exact_match", "the cat sat", ["cat"], 0.0),
        ("exact_match", "U.S.A.", ["usa"], 1.0),
        ("exact_match", "well-known", ["wellknown"], 1.0),
        ("token_f1", "the cat sat", ["cat"], 2 / 3),
        ("token_f1", "cat cat dog", ["cat dog dog"], 2 / 3),  # words are counted, not only found
        ("token_f1", "x", ["y", "x z"], 2 / 3),
        ("token_f1", "nothing alike", ["cat"], 0.0),
        # SQuAD 2.0: where one side is empty, 1 if both are.
        ("token_f1", "", [""], 1.0),
        ("token_f1", "the", ["a"], 1.0),
        ("token_f1", "cat", [""], 0.0),
        ("exact_match", "", [""], 1.0),
        # HELMET: a normalised reference inside the normalised prediction, for the best reference (never their mean).
        ("substring_exact_match", "It was the Eiffel Tower, in Paris.", ["Eiffel tower"], 1.0),
        ("substring_exact_match", "Paris", ["The Eiffel Tower", "Paris", "a", "b"], 1.0),
        ("substring_exact_match", "Eiffel", ["Eiffel Tower"], 0.0),
        # Ours: whole words, since a short value stands in many longer ones.
        ("substring_exact_match", "It weighs 213 ounces", ["13"], 1.0),
        ("words_match", "It weighs 213 ounces", ["13"], 0.0),
        ("words_match", "It weighs 13 ounces.", ["12", "13"], 1.0),
        ("words_match", "a satin cloak", ["tin"], 0.0),
        ("words_match", "In the Blue Room", ["blue room"], 1.0),
        # ROUGE (Lin 2004): "police killed the gunman" is that paper's example; F with stemming.
        ("rouge_l", "police kill the gunman", ["police killed the gunman"], 1.0),  # stemmed: killed = kill
        ("rouge_l", "the gunman kill police", ["police killed the gunman"], 0.5),
        ("rouge_1", "the gunman kill police", ["police killed the gunman"], 1.0),
        ("rouge_2", "the gunman kill police", ["police killed the gunman"], 1 / 3),
        ("rouge_l", "a b c", ["x y z", "a b d"], 2 / 3),
        ("coverage", "a b c d e f", ["a b x y"], 0.5),
        ("coverage", "", ["a b"], 0.0),
    ],
)
def test_parity(metric, prediction, references, expected):
    assert METRICS[metric](prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize("metric", METRICS)
def test_a_reference_itself_scores_one_and_nothing_scores_zero(metric):
    assert METRICS[metric]("Vistula river 1943", ["Vistula river 1943"]) == 1.0
    assert METRICS[metric]("", ["Vistula river 1943"]) == 0.0
    assert METRICS[metric]("quite other words", ["Vistula river 1943"]) == 0.0


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "string_match_all"])
def test_a_further_reference_lowers_no_score(metric):
    assert METRICS[metric]("Vistula river", ["Vistula river", "something else"]) == 1.0


def test_normalisation_keeps_what_squad_keeps():
    assert normalized("The  “Theatre”, an a.b-c!") == "“theatre” abc"  # only ASCII punctuation and whole articles go

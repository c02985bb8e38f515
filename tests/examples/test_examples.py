"""The examples run as they are, on the default weights."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "python_api.py": ["1944", "chunks left out", "Warsaw.txt [", "1944."],
    "many_questions.py": ["War and Peace: ", "Who is Prince Vasili?", "tokens reused"],
    "llama_index_engine.py": ["1944", "tokens of prompt, 0 nodes left out", "Warsaw"],
}


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == SAYS.keys()


@pytest.mark.weights
@pytest.mark.parametrize("name", SAYS)
def test_an_example_says_what_it_should(name):
    result = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    for words in SAYS[name]:
        assert words in result.stdout

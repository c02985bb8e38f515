"""Ask many questions about one book, which is read once.

python examples/many_questions.py
"""

import json
import lzma
import tempfile
from pathlib import Path

from stripedrag import Document, Index, Pipeline

NOVELS = Path(__file__).parents[1] / "eval" / "data" / "haystack" / "novels.jsonl.xz"
QUESTIONS = [
    "Who is the father of Pierre?",
    "Who is Prince Vasili?",
    "Whose drawing room was filling?",
    "From what did Anna Pavlovna suffer?",
]


def main() -> None:
    """Read the beginning of a novel, then answer all questions from it."""
    with lzma.open(NOVELS, "rt") as lines:
        chapters = [json.loads(line) for line in lines]
    text = "\n\n".join(chapter["text"] for chapter in chapters[:8])

    with tempfile.TemporaryDirectory() as folder, Index.create(Path(folder) / "index") as index:
        index.add([Document(id="book", title="War and Peace", text=text)])
        pipeline = Pipeline.open(index)
        book = pipeline.context_of(["book"], 3000)
        warmed = pipeline.warm(book)
        print(f"War and Peace: {warmed.tokens} tokens read in {warmed.seconds:.1f} s, {len(book.dropped)} chunks left")

        for answer in pipeline.ask_many(QUESTIONS, context=book, answer_tokens=32):
            seconds = answer.timings.prefill_s + answer.timings.decode_s
            print(f"{answer.question}\n  {answer.text}\n  {seconds:.2f} s, {answer.usage.reused_tokens} tokens reused")


if __name__ == "__main__":
    main()

"""Index a few articles, ask a question, and look at what the answer rests on.

python examples/python_api.py
"""

import tempfile
from pathlib import Path

from stripedrag import Index, Pipeline
from stripedrag.indexes import read_documents

ARTICLES = Path(__file__).parents[1] / "eval" / "data" / "xquad"


def main() -> None:
    """Build an index in a temporary folder and ask it."""
    with tempfile.TemporaryDirectory() as folder:
        with Index.create(Path(folder) / "index") as index:
            index.add(document for document in read_documents(ARTICLES) if document.title in ("Warsaw", "Oxygen"))

        with Pipeline.open(Path(folder) / "index") as pipeline:
            for piece in (stream := pipeline.stream("When was the Warsaw Uprising?", context_tokens=1024)):
                print(piece, end="", flush=True)
            answer = stream.answer
            print(f"\n{answer.usage.passage_tokens} tokens of passages, {len(answer.context.dropped)} chunks left out")
            for citation in answer.citations:
                print(f"{citation.doc_id} [{citation.start}:{citation.end}] {citation.quote}")
                text = pipeline.index.document(citation.doc_id).text
                assert text[citation.start : citation.end] == citation.quote


if __name__ == "__main__":
    main()

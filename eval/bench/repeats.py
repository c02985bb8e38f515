"""Evidence whose very text stands in a corpus more than once."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from stripedrag.eval.places import Located, holds, touches
from stripedrag.eval.schema import Stretch
from stripedrag.indexes.index import Index
from stripedrag.rag.packing import RUN_WORDS, runs_of_words

_WORD = re.compile(r"\S+")


class Repeats:
    """Knows where the words of the chunks around pieces of evidence occur in an index.

    A piece is repeated in a context where each run of `RUN_WORDS` words of the chunks that it touches stands there: the
    product's own rule for a repeat. It asks for more than the piece, whose words alone may mean something else there.
    """

    def __init__(self, index: Index, evidence: Iterable[Stretch]) -> None:
        self._runs = {
            piece: set().union(*(runs_of_words(c.text) for c in index.chunks(piece.doc_id) if touches(c, [piece])))
            for piece in evidence
        }
        self._places: dict[tuple[str, ...], list[Stretch]] = defaultdict(list)
        wanted = set().union(*self._runs.values())
        for doc_id in index.document_ids():
            found = list(_WORD.finditer(index.document(doc_id).text))
            words = [word.group().lower() for word in found]
            for at in range(len(words) - RUN_WORDS + 1):
                if (run := tuple(words[at : at + RUN_WORDS])) in wanted:
                    start, end = found[at].start(), found[at + RUN_WORDS - 1].end()
                    self._places[run].append(Stretch(doc_id=doc_id, start=start, end=end))

    def found(self, context: Sequence[Located], evidence: Sequence[Stretch]) -> bool:
        """Whether each piece of `evidence` lies in `context`, at its own place or as a repeat."""
        return all(holds(context, [piece]) or self._repeated(context, piece) for piece in evidence)

    def _repeated(self, context: Sequence[Located], piece: Stretch) -> bool:
        places = sorted((self._places[run] for run in self._runs[piece]), key=len)  # the rare ones decide soonest
        return bool(places) and all(any(holds(context, [place]) for place in found) for found in places)

"""The tasks that a suite can declare, by kind. A new one is a module and a line here; contract tests run over all."""

from typing import Annotated

from pydantic import Field

from stripedrag.eval.tasks.base import ReadingTask, Task
from stripedrag.eval.tasks.cost import CostTask
from stripedrag.eval.tasks.lm_eval import LMEvalTask
from stripedrag.eval.tasks.long_documents import LongDocumentsTask
from stripedrag.eval.tasks.multi_hop import MultiHopTask
from stripedrag.eval.tasks.needle import NeedleTask
from stripedrag.eval.tasks.no_overlap import NoOverlapTask
from stripedrag.eval.tasks.perplexity import PerplexityTask
from stripedrag.eval.tasks.rag import RagTask
from stripedrag.eval.tasks.recall import RecallTask
from stripedrag.eval.tasks.retrieval import CorpusRetrievalTask, JudgedRetrievalTask
from stripedrag.eval.tasks.shared import SharedContextTask
from stripedrag.eval.tasks.tracking import TrackingTask
from stripedrag.eval.tasks.unanswerable import UnanswerableTask
from stripedrag.eval.tasks.words import WordsTask

AnyTask = Annotated[
    NeedleTask
    | NoOverlapTask
    | TrackingTask
    | WordsTask
    | MultiHopTask
    | RecallTask
    | RagTask
    | SharedContextTask
    | UnanswerableTask
    | LongDocumentsTask
    | CorpusRetrievalTask
    | JudgedRetrievalTask
    | PerplexityTask
    | CostTask
    | LMEvalTask,
    Field(discriminator="kind"),
]

__all__ = ["AnyTask", "ReadingTask", "Task"]

"""Making a StripedHyena of a transformer: attention layers become Hyena layers that learn from them.

    run = Run(folder, Recipe(), teacher, framing, corpus)
    student = run.train(run.hyena_layers(progress), progress)
    evaluation = run.finish(student, to)

`stripedrag.rag.striping` reads a corpus from files and frames it as the pipeline asks.
"""

from stripedrag.model.striping.data import Asked, Corpus, Framing, Text
from stripedrag.model.striping.evaluation import Evaluation
from stripedrag.model.striping.recipe import Recipe, Stage
from stripedrag.model.striping.run import Run
from stripedrag.model.striping.training import Progress

__all__ = ["Asked", "Corpus", "Evaluation", "Framing", "Progress", "Recipe", "Run", "Stage", "Text"]

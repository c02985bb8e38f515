"""Scores of a run's predictions, made anew from its files: no model, no texts."""

import math
from typing import Any

from stripedrag.errors import UsageError
from stripedrag.eval.run_files import Run, write_whole
from stripedrag.eval.schema import Failure, Score, dumps


def score(made: Run) -> list[Score]:
    """Score every prediction of a run and write them to its `scores.jsonl`; a failure has no score.

    Raises `UsageError` where the folder is no run or none of it was run yet.
    """
    tasks: dict[str, Any] = {task.name: task for task in made.suite().tasks}
    samples, predictions = made.results()
    if not predictions:
        raise UsageError(f"{made.folder} has no prediction yet. Run it with `stripedrag eval run`.")
    scores = []
    for prediction in predictions:
        sample, output = samples[prediction.sample_id], prediction.output
        given = {} if isinstance(output, Failure) else tasks[sample.task].score(sample, output)
        for metric, value in given.items():
            if not math.isfinite(value):
                raise UsageError(
                    f"{prediction.system} has {metric} {value} on {sample.id}, which is no score. Its arithmetic "
                    f"overflows: try float32, or leave the system out."
                )
        scores.append(Score(system=prediction.system, sample_id=sample.id, scores=given))
    write_whole(made.scores, "".join(dumps(record) + "\n" for record in scores))
    return scores

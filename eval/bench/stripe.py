"""A step of striping, end to end, against the matrix products that it cannot do without.

The limit is the products themselves, of the shapes that the step was seen to take, alone and one after another in the
same dtype: linear layers forward, their gradients, the unembedding, and the products within attention, half of them for
a causal one. Whatever else a step does (norms, gates, softmax, the Hyena operator, the optimizer) comes on top.
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stripedrag.eval.bench.report import Report, interleaved, machine, medians
from stripedrag.eval.data_formats import DATA
from stripedrag.hardware import keep_freed_memory
from stripedrag.model.loading import load_model
from stripedrag.model.smollm2 import BASELINE, STRIPED
from stripedrag.model.striping import Recipe, Stage
from stripedrag.model.striping.data import TEXT, Windows
from stripedrag.model.striping.distillation import take_step
from stripedrag.model.striping.processes import Processes
from stripedrag.model.striping.student import make_trainable, stripe_layers
from stripedrag.model.striping.teacher import Teacher

LENGTHS = (512, 1024)
Product = tuple[int, int, int, int]  # batch, rows, inner, columns


def run(repeats: int) -> Report:
    """Tokens a second of a step with the teacher's word known, of its products alone, and of asking the teacher."""
    keep_freed_memory()  # as a run does
    teacher, tokenizer = load_model(BASELINE, device="cpu")
    striped, _ = load_model(STRIPED, device="cpu")
    recipe = Recipe()
    layers = sorted(set(range(striped.config.num_layers)) - set(striped.config.attn_layer_idxs))
    generator = torch.Generator().manual_seed(0)
    student = stripe_layers(teacher, layers, modes=recipe.modes, taps=recipe.taps, generator=generator)
    make_trainable(student, rank=recipe.rank)
    student.train()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    text = "\n\n".join(path.read_text() for path in sorted((DATA / "xquad").glob("*.txt")))
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int32)
    processes, rows = Processes(), []
    with tempfile.TemporaryDirectory() as folder:
        sayings = Teacher(teacher.requires_grad_(False), Path(folder))
        for length in LENGTHS:
            stage = Stage(name="bench", tokens=recipe.stages[1].batch_tokens, length=length, hyena_rate=1.0)
            some = ids[: stage.tokens].view(-1, length)
            windows = Windows(some, torch.full(some.shape, TEXT, dtype=torch.uint8))
            sayings.targets(windows, answer_weight=1.0)

            def step(stage: Stage = stage, windows: Windows = windows) -> None:
                optimizer.zero_grad(set_to_none=True)
                take_step(student, sayings, stage, windows, processes)
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()

            def ask(windows: Windows = windows) -> None:
                sayings.ask(windows)

            with _Products() as seen:
                step()
            products = _Replay(seen.products, student.get_input_embeddings().weight.dtype)
            seconds = interleaved(repeats, step=step, products=products.run, teacher=ask)
            middle = medians(seconds)
            rows.append(
                {
                    "length": length,
                    "tokens": some.numel(),
                    "flop": products.flop,
                    "seconds": seconds,
                    "tokens_per_s": {name: some.numel() / taken for name, taken in middle.items()},
                    "of_products": middle["products"] / middle["step"],
                }
            )
    figures = {"bench": "stripe", "machine": machine(), "repeats": repeats, "layers": layers, "lengths": rows}
    return Report(figures, _table(figures))


class _Products(TorchDispatchMode):
    """Counts the shapes of every matrix product that is done while it is on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("aten::mm", "aten::bmm"):
            self._note(args[0], args[1])
        elif name == "aten::addmm":
            self._note(args[1], args[2])
        elif "flash_attention_for_cpu" in name:
            backward = "backward" in name
            query, key = args[1:3] if backward else args[:2]
            batch, heads, length, width = query.shape
            # forward QKᵀ and PV; backward QKᵀ again, dV, dP, dQ, dK; each half of L²
            shape = (batch * heads, length // 2, width, key.shape[2])
            self.products[shape] += 5 if backward else 2
        return func(*args, **(kwargs or {}))

    def _note(self, a: Tensor, b: Tensor) -> None:
        batch = a.shape[0] if a.ndim == 3 else 1
        self.products[(batch, a.shape[-2], a.shape[-1], b.shape[-1])] += 1


class _Replay:
    """The same products on other numbers."""

    def __init__(self, products: Counter[Product], dtype: torch.dtype) -> None:
        self._work = [
            (torch.randn(b, m, k, dtype=dtype), torch.randn(b, k, n, dtype=dtype), count)
            for (b, m, k, n), count in products.items()
        ]
        self.flop = sum(2 * b * m * k * n * count for (b, m, k, n), count in products.items())

    def run(self) -> None:
        """All of them, each as often as it was seen."""
        for a, b, count in self._work:
            for _ in range(count):
                if a.shape[0] == 1:
                    torch.mm(a[0], b[0])
                else:
                    torch.bmm(a, b)


def _table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, {here['dtype']}, torch {here['torch']}, {here['commit']}",
        "",
        f"{'window':>7}{'step, tokens/s':>16}{'products alone':>16}{'of them':>9}{'teacher':>9}{'GFLOP/s':>9}",
    ]
    for row in figures["lengths"]:
        rates = row["tokens_per_s"]
        lines.append(
            f"{row['length']:>7}{rates['step']:>16.0f}{rates['products']:>16.0f}{row['of_products']:>9.0%}"
            f"{rates['teacher']:>9.0f}{row['flop'] / row['tokens'] * rates['products'] / 1e9:>9.0f}"
        )
    lines += ["", f"medians of {figures['repeats']}, interleaved; GFLOP/s are those of the products alone"]
    return "\n".join(lines)

"""Benchmarks by name: each is a module with `run(repeats) -> Report`. Run by `stripedrag bench`."""

LONG_BENCHES = ("generate", "train")  # of hours: their `run` takes `so_far`, too, the file to go on from
SHORTEST_PROMPT = 1024  # tokens, of `generate` and `prefill`: their `run` takes the `longest`, too

BENCHES = {
    "attention": "stripedrag.eval.bench.attention",
    "context": "stripedrag.eval.bench.context",
    "decode": "stripedrag.eval.bench.decode",
    "embed": "stripedrag.eval.bench.embed",
    "filter": "stripedrag.eval.bench.filter",
    "generate": "stripedrag.eval.bench.generate",
    "layer": "stripedrag.eval.bench.layer",
    "load": "stripedrag.eval.bench.load",
    "loss": "stripedrag.eval.bench.loss",
    "memory": "stripedrag.eval.bench.memory",
    "prefill": "stripedrag.eval.bench.prefill",
    "quantize": "stripedrag.eval.bench.quantize",
    "recall": "stripedrag.eval.bench.recall",
    "roofline": "stripedrag.eval.bench.roofline",
    "rows": "stripedrag.eval.bench.rows",
    "scale": "stripedrag.eval.bench.scale",
    "stream": "stripedrag.eval.bench.stream",
    "stripe": "stripedrag.eval.bench.stripe",
    "train": "stripedrag.eval.bench.train",
}

"""Benchmarks by name: each is a module with `run(repeats) -> Report`. Run by `stripedrag bench`."""

BENCHES = {"generate": "stripedrag.eval.bench.generate"}

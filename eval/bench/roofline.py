"""What the Hyena operator takes on a GPU by the bytes that its Triton kernels move and the instructions that they
issue, and what part of a layer of the 7B that is: a prediction, to be held against the measurements of
`stripedrag bench filter --device cuda`.

Nothing runs. A pass takes as long as its slower side at the device's published peak: of memory, which inputs that lie
in the second-level cache pass, and of float32 multiply-adds, at which arithmetic, loads, stores and conversions are
counted (an A100 issues others beside them), but not addresses, predicates and latencies: a bound from below. Products
and attention are taken at the peak of dense bfloat16, which flatters them.
"""

from pathlib import Path
from typing import Any, NamedTuple

from stripedrag.eval.bench.report import Report, commit, plot
from stripedrag.kernels.gpu import BLOCK, chunk_tokens

LENGTHS = (32_768, 131_072, 2**20)
MODES, TAPS = (2, 8), 3  # the 7B's filters, and Evo's
CHANNELS, MLP, QUERY_GROUPS = 4096, 14_336, 4  # of the 7B: H, the width of its MLP, queries a key
ELEMENT, WORK = 2, 4  # bytes of bfloat16, and of the states


class Device(NamedTuple):
    """Published peaks: bytes/s of memory, multiply-adds/s in float32, operations/s of dense bfloat16 products, of what
    torch calls `name`.
    """

    name: str
    multiprocessors: int
    bytes_per_s: float
    fma_per_s: float
    matmul_per_s: float


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM.
DEVICES = {
    "A100": Device("NVIDIA A100-SXM4-80GB", 108, 2.039e12, 19.5e12 / 2, 312e12),
    "H100": Device("NVIDIA H100 80GB HBM3", 132, 3.35e12, 66.9e12 / 2, 989e12),
    "H200": Device("NVIDIA H200", 132, 4.8e12, 66.9e12 / 2, 989e12),
}


class Pass(NamedTuple):
    """One kernel: how often it runs a chunk of all but `less` of them, columns of H that it reads and writes a token,
    numbers of the states' dtype a chunk and channel, and instructions a token and channel.
    """

    name: str
    less: int
    columns: int
    chunk_numbers: int
    instructions: int


def forward(n: int, k: int) -> list[Pass]:
    """The passes of a forward run with N modes and K taps. Multiply-adds, loads, stores and conversions count alike."""
    return [
        Pass("chunk_states", 1, 2, 2 * n, (2 * k + 1 + 4 * n) + 4),
        Pass("carry", 1, 0, 4 * n, 0),
        Pass("outputs", 0, 4, 2 * n, (3 * k + 3 + 6 * n) + 8),
    ]


def backward(n: int, k: int) -> list[Pass]:
    """The passes of a backward run."""
    return [
        Pass("chunk_adjoints", 1, 2, 2 * n, (k + 1 + 6 * n) + 4),
        Pass("carry", 1, 0, 4 * n, 0),
        Pass("gate_gradients", 0, 5, 4 * n + k + 2, (3 * k + 1 + 4 * n) + (2 * n + 2 + 2 * n + 1) + (2 * k + 1) + 10),
        Pass("input_gradients", 0, 6, 6 * n + 2 * k + 2, (3 * k + 2) + (13 * n + 4) + 2 * (2 * k + 1) + 12),
    ]


def run(repeats: int) -> Report:
    """Programs, bytes, instructions and least milliseconds of each pass, and a layer of the 7B around them."""
    del repeats  # nothing is timed
    rows = [_row(name, device, length, n) for name, device in DEVICES.items() for length in LENGTHS for n in MODES]
    figures = {"bench": "roofline", "commit": commit(), "channels": CHANNELS, "taps": TAPS, "rows": rows}
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


def passes(
    listed: list[Pass], device: Device, length: int, *, channels: int = CHANNELS, batch: int = 1
) -> list[dict[str, Any]]:
    """What each pass launches, moves and issues, and the seconds of its slower side."""
    tokens = chunk_tokens(batch, length, channels, device.multiprocessors)
    chunks = -(-length // tokens)
    found = []
    for one in listed:
        share = (chunks - one.less) / chunks
        moved = (
            channels * batch * (one.columns * ELEMENT * length * share + one.chunk_numbers * WORK * (chunks - one.less))
        )
        issued = channels * batch * one.instructions * length * share
        seconds = {"bytes": moved / device.bytes_per_s, "instructions": issued / device.fma_per_s}
        blocks = batch * -(-channels // BLOCK)
        found.append(
            {
                "pass": one.name,
                "chunk_tokens": tokens,
                "programs": blocks * (chunks - one.less) if one.columns else blocks * (one.chunk_numbers // 4),
                "bytes": moved,
                "instructions": issued,
                "seconds": max(seconds.values()),
                "bound_by": max(seconds, key=lambda side: seconds[side]),
            }
        )
    return found


def _row(name: str, device: Device, length: int, n: int) -> dict[str, Any]:
    ahead, back = (passes(side(n, TAPS), device, length) for side in (forward, backward))
    operator = sum(one["seconds"] for one in ahead)
    products = length * CHANNELS * (4 * CHANNELS + 3 * MLP)  # multiply-adds of a Hyena layer
    projections = length * CHANNELS * (2 * CHANNELS + 2 * CHANNELS // QUERY_GROUPS + 3 * MLP)
    scores = length * length * CHANNELS  # multiply-adds of both products of causal attention
    hyena = operator + 2 * products / device.matmul_per_s
    return {
        "device": name,
        "length": length,
        "modes": n,
        "forward": ahead,
        "backward": back,
        "forward_s": operator,
        "backward_s": sum(one["seconds"] for one in back),
        # z read once and y written once, at the rate of memory: what no way of cutting it could pass
        "least_s": 4 * ELEMENT * length * CHANNELS / device.bytes_per_s,
        "hyena_layer_s": hyena,
        "of_hyena_layer": operator / hyena,
        "attention_layer_s": 2 * (projections + scores) / device.matmul_per_s,
    }


def _table(figures: dict[str, Any]) -> str:
    lines = [
        f"the Hyena operator, H {figures['channels']:,}, K {figures['taps']}, batch 1, bfloat16, {figures['commit']}",
        "ms by published peaks; nothing ran",
        "",
        f"{'':6}{'L':>10}{'N':>4}{'forward':>9}{'least':>8}{'backward':>10}{'of layer':>10}{'Hyena':>9}"
        f"{'attention':>11}",
    ]
    for row in figures["rows"]:
        lines.append(
            f"{row['device']:6}{row['length']:>10,}{row['modes']:>4}{1e3 * row['forward_s']:>9.2f}"
            f"{1e3 * row['least_s']:>8.2f}{1e3 * row['backward_s']:>10.2f}{row['of_hyena_layer']:>10.1%}"
            f"{1e3 * row['hyena_layer_s']:>9.1f}{1e3 * row['attention_layer_s']:>11.1f}"
        )
    lines += ["", "passes on an H100 at 131,072 tokens", ""]
    lines += [f"{'':18}{'N':>3}{'T':>5}{'programs':>10}{'GB':>8}{'G instr.':>10}{'ms':>8}  bound by"]
    for row in figures["rows"]:
        if (row["device"], row["length"]) == ("H100", 131_072):
            lines += [
                f"{one['pass']:18}{row['modes']:>3}{one['chunk_tokens']:>5}{one['programs']:>10,}"
                f"{one['bytes'] / 1e9:>8.2f}{one['instructions'] / 1e9:>10.1f}{1e3 * one['seconds']:>8.3f}"
                f"  {one['bound_by']}"
                for one in (*row["forward"], *row["backward"])
            ]
    lines += [
        "",
        "least: z read once and y written once. of layer: the operator's part of a Hyena layer with its products.",
        f"Hyena, attention: a layer of the 7B, its MLP of {MLP:,} included, products at the peak of dense bfloat16.",
    ]
    return "\n".join(lines)


def _plot(figures: dict[str, Any], path: Path) -> None:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in figures["rows"]:
        if row["modes"] == MODES[0]:
            for side in ("hyena", "attention"):
                point = (row["length"], 1e3 * row[f"{side}_layer_s"])
                series.setdefault(f"{row['device']}, {side}", []).append(point)
    plot(path, series, "a layer of the 7B, by published peaks", "tokens", "ms", log_x=True)

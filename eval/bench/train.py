"""A training step of StripedHyenas and of Llamas of the same width, depth, MLP, heads and vocabulary, in turn.

Whole steps (forward, backward, AdamW) of two layers at the published 7B's widths, one of them attention against both;
on a GPU of all 32. What no machine of that size takes whole is composed of its measured parts: what a layer does with
each position is measured once and grows with the positions; attention and the Hyena operator are measured at every
length. The same composition of the steps that were taken whole says how far it is off.

The Llamas are of our own blocks, with attention in every layer: their norms and gates are the same kernels, but their
attention is torch's, on a CPU by the faster of its two ways. transformers' own stands beside at the first length. The
loss is `ops.linear_cross_entropy` for all. What is composed is told with our attention in the Llamas, too: what the
pattern alone gives.
"""

import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stripedrag.errors import StoreError
from stripedrag.eval.bench.layer import Layers, Side, TorchsAttention
from stripedrag.eval.bench.load import published
from stripedrag.eval.bench.report import Report, device_of, interleaved, matmul_rate, plot, seconds_on
from stripedrag.eval.bench.so_far import SoFar, going_on
from stripedrag.eval.meter import bounded_memory
from stripedrag.hardware import fast_dtype, keep_freed_memory
from stripedrag.kernels import ops
from stripedrag.kernels.dispatch import select
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.memory import free_bytes
from stripedrag.model.modeling import StripedHyenaForCausalLM

LAYERS = 32  # of the 7B
WIDTH, HEAD_WIDTH = 4096, 128
PATTERNS = {"1 of 2": (32, 2), "1 of 3": (33, 3), "1 of 11": (33, 11)}  # layers, every so many-th is attention
BASE = 8192  # tokens at which what grows with the positions is measured
WHOLE = (8192, 32_768)  # tokens of whole steps
COMPOSED = (8192, 32_768, 65_536, 131_072)
CURVE_WIDTHS, CURVE_LENGTHS = (1024, 2048), (2048, 8192, 32_768)
STRIPED, LLAMA, TRANSFORMERS = "StripedHyena", "Llama", "transformers' Llama"
_SHARE = 0.7  # of the free memory that activations may fill before they are made again instead
_WARM_UP_TOKENS = 512


class Passes(NamedTuple):
    """Seconds forward and backward."""

    forward: float
    backward: float

    def step(self, again: bool) -> float:
        """Of a training step, in which activations may be made again."""
        return self.forward * (1 + again) + self.backward


def run(repeats: int, device: str = "cpu", so_far: Path | None = None) -> Report:
    """Seconds of whole steps, of their parts, and of what is composed of these; ratios of Llama over StripedHyena.

    What is measured goes to `so_far` as it comes, from which a run that was cut goes on. Raises `UsageError` for a
    device that is not there, and where `so_far` is of another commit, processor, device or number of repeats.
    """
    place = device_of(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else device
    measured, here = going_on(so_far, device=name, repeats=repeats)
    keep_freed_memory()  # as a run of training does
    on_place = torch.cuda.device(place if place.type == "cuda" else -1)
    with on_place, Progress(console=Console(stderr=True)) as progress:
        bench = _Bench(place, repeats, progress, measured)
        parts = bench.parts()
        whole = bench.whole()
        curves = bench.curves()
        rate = measured.measured("matmul rate", lambda: matmul_rate(fast_dtype(place), place))
    config = configuration(WIDTH, 2, 2)
    figures = {
        "bench": "train",
        "device": name,
        "dtype": str(fast_dtype(place)).removeprefix("torch."),
        "backend": select(None, place, config.short_filter_length, config.state_size).name,
        "matmul_flop_per_s": rate,
        "machine": here,
        "repeats": repeats,
        "resumed": measured.resumed,
        "whole": whole,
        "parts": parts,
        "curves": curves,
        **_composed(whole, parts),
    }
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


def widths(width: int) -> dict[str, Any]:
    """The published 7B's configuration at another width, in the proportions of the 7B and with its heads' width."""
    config = published()
    layout = ("attn_layer_idxs", "hyena_layer_idxs", "num_layers", "vocab_size")
    return {
        **{key: value for key, value in config.items() if key not in layout},
        "hidden_size": width,
        "num_filters": width,
        "num_attention_heads": width // HEAD_WIDTH,
        "inner_mlp_size": config["inner_mlp_size"] * width // config["hidden_size"],
        "max_seqlen": max(COMPOSED),
    }


def configuration(width: int, layers: int, every: int) -> StripedHyenaConfig:
    """A StripedHyena of which the last of `every` so many layers is attention; 1: all, which is a Llama."""
    attention = [i for i in range(layers) if i % every == every - 1]
    hyena = [i for i in range(layers) if i not in attention]
    return StripedHyenaConfig(
        num_layers=layers,
        attn_layer_idxs=attention,
        hyena_layer_idxs=hyena,
        vocab_size=published()["vocab_size"],
        **widths(width),
    )


def llama(config: StripedHyenaConfig) -> LlamaConfig:
    """transformers' configuration of a Llama of the same shape."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_seqlen,
        rope_theta=config.rotary_emb_base,
    )


class Training:
    """A model and its optimizer, in bfloat16 (float32 where the device has no products of that) but for what stays
    float32. One without Hyena layers is a Llama, whose attention is torch's.
    """

    def __init__(self, config: StripedHyenaConfig | LlamaConfig, device: torch.device, *, again: bool) -> None:
        """`again` makes the activations of each layer again for its gradient instead of keeping them."""
        torch.manual_seed(0)
        with device:
            ours = isinstance(config, StripedHyenaConfig)
            made = StripedHyenaForCausalLM(config) if ours else LlamaForCausalLM(config)
        self.model: PreTrainedModel = made.to(fast_dtype(device)).train()
        if isinstance(made, StripedHyenaForCausalLM) and not made.config.hyena_layer_idxs:
            for block in made.backbone.blocks:
                block.inner_mha_cls.__class__ = TorchsAttention
        if again:
            name = "activation_checkpointing_enable"  # of which older versions have only the other name
            getattr(self.model, name, self.model.gradient_checkpointing_enable)()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self, ids: Tensor) -> float:
        """Loss of ids (1, L), after which the weights are others.

        Raises `StoreError` where it is no number.
        """
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        output = self.model.get_output_embeddings().weight
        assert isinstance(output, Tensor)
        taken = ops.linear_cross_entropy(hidden[0, :-1], output, ids[0, 1:])
        taken.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not taken.isfinite():
            raise StoreError(f"the loss of a step on {ids.shape[1]} tokens is {taken.item()}")
        return taken.item()


class _Bench:
    def __init__(self, device: torch.device, repeats: int, progress: Progress, so_far: SoFar) -> None:
        self._device, self._dtype, self._repeats = device, fast_dtype(device), repeats
        self._progress, self._measured = progress, so_far.measured
        self._is_gpu = device.type == "cuda"
        self._clock = functools.partial(seconds_on, device)
        self._free = free_bytes(device)

    def whole(self) -> list[dict[str, Any]]:
        """Seconds of whole steps by model and length, the models made anew and taken in turn."""
        layers, lengths = (LAYERS, COMPOSED) if self._is_gpu else (2, WHOLE)
        striped, transformer = configuration(WIDTH, layers, 2), configuration(WIDTH, layers, 1)
        sides: dict[str, StripedHyenaConfig | LlamaConfig] = {STRIPED: striped, LLAMA: transformer}
        task = self._progress.add_task("whole steps", total=len(lengths) * self._repeats)
        rows = []
        for length in lengths:
            again = self._makes_again(layers, length)
            taken = sides | ({TRANSFORMERS: llama(transformer)} if length == lengths[0] else {})
            seconds: dict[str, list[float]] = {name: [] for name in taken}
            for i in range(self._repeats):
                for name, config in taken.items():
                    step = functools.partial(self._step, config, length, again)
                    if (second := self._measured(f"step {i} of {name}, {length} tokens", step)) is not None:
                        seconds[name].append(second)
                self._progress.advance(task)
            for name, runs in seconds.items():
                hyena = layers // 2 if name == STRIPED else 0
                row = {"model": name, "tokens": length, "layers": layers, "again": again}
                row["flop"] = flops(layers - hyena, hyena, length, again=again)
                rows.append(row | {"seconds": runs, "median_s": median(runs) if runs else None})
        return rows

    def _step(self, config: StripedHyenaConfig | LlamaConfig, length: int, again: bool) -> float | None:
        """Seconds of a step of a new model, after a short one; None where there is too little memory."""
        ids = torch.randint(3, 32_000, (1, length), generator=torch.Generator().manual_seed(0)).to(self._device)

        def seconds() -> float:
            training = Training(config, self._device, again=again)
            training.step(ids if self._is_gpu else ids[:, :_WARM_UP_TOKENS])
            return self._clock(functools.partial(training.step, ids))

        try:
            with bounded_memory():
                return seconds()
        except (torch.OutOfMemoryError, MemoryError):
            return None
        except RuntimeError as error:  # of torch's allocator on a CPU, or of oneDNN
            if self._is_gpu or not any(word in str(error) for word in ("alloc", "memory", "primitive")):
                raise
            return None
        finally:
            gc.collect()  # before the next, which needs the same memory
            if self._is_gpu:
                torch.cuda.empty_cache()

    def _makes_again(self, layers: int, length: int) -> bool:
        name = f"made again, {layers} layers, {length} tokens"
        return bool(self._measured(name, lambda: self.makes_again(layers, length)))

    def makes_again(self, layers: int, length: int) -> bool:
        """Whether activations of so many layers, as they are kept for the gradient, would fill the free memory; on a
        CPU beyond `BASE` in any case, so that no figure hangs on what else runs.
        """
        if not self._is_gpu:
            return length > BASE
        config = configuration(WIDTH, 2, 2)
        kept = length * self._dtype.itemsize * (10 * config.hidden_size + 4 * config.mlp_size)
        held = 8 * layers // 2 * sum(parameters(kind) for kind in ("attention", "hyena")) + 8 * parameters("rest")
        return layers * kept > _SHARE * (self._free - held)

    def parts(self) -> dict[str, Any]:
        """Seconds of what whole steps consist of."""
        layers = Layers(widths(WIDTH), self._device)
        config = layers.config
        # On a CPU a head is like another, and enough of them for its threads stand for all.
        enough = (
            heads
            for heads in range(1, config.num_key_value_heads)
            if config.num_key_value_heads % heads == 0 and config.proj_groups * heads % torch.get_num_threads() == 0
        )
        kv_heads = config.num_key_value_heads if self._is_gpu else next(enough, config.num_key_value_heads)
        sides = layers.sides(BASE, gradient=True)
        sides |= {"last_product": layers.last_product(BASE), "head": self._head(config)}
        task = self._progress.add_task("parts", total=1 + len(COMPOSED))
        parts = {name: {BASE: passes} for name, passes in self._passes("layers", sides, BASE).items()}
        self._progress.advance(task)
        for length in COMPOSED:
            of_length = layers.core(length, kv_heads) | {"operator": layers.operator(length, gradient=True)}
            for name, passes in self._passes("mixers", of_length, length).items():
                times = 1 if name == "operator" else config.num_key_value_heads // kv_heads
                parts.setdefault(name, {})[length] = Passes(*(times * seconds for seconds in passes))
            self._progress.advance(task)
        del layers, sides, of_length
        return {
            "core_measured": f"{kv_heads} of {config.num_key_value_heads} key/value heads",
            "seconds": {
                name: {str(at): passes._asdict() for at, passes in some.items()} for name, some in parts.items()
            },
            "optimizer_s_a_parameter": self._measured("optimizer", self._optimizer),
            "makes_again": {str(length): self._makes_again(2, length) for length in COMPOSED},
            "parameters": {kind: parameters(kind) for kind in ("attention", "hyena", "rest")},
        }

    def _head(self, config: StripedHyenaConfig) -> Side:
        vocabulary = published()["vocab_size"]
        hidden = torch.randn(BASE, config.hidden_size, device=self._device, dtype=self._dtype, requires_grad=True)
        output = torch.randn(vocabulary, config.hidden_size, device=self._device, dtype=self._dtype).mul_(0.02)
        labels = torch.randint(vocabulary, (BASE,), device=self._device)
        return Side(lambda: ops.linear_cross_entropy(hidden, output, labels), (hidden, output.requires_grad_()))

    def _passes(self, what: str, sides: dict[str, Side], length: int) -> dict[str, Passes]:
        """The medians of each side's forward and backward run, all taken in turn."""
        measured = self._measured(f"{what}, {length} tokens", lambda: self._medians(sides, length))
        return {name: Passes(*passes) for name, passes in measured.items()}

    def _medians(self, sides: dict[str, Side], length: int) -> dict[str, tuple[float, float]]:
        warm_ups = int(self._is_gpu or length <= BASE)  # what takes minutes takes no longer the first time
        if not warm_ups and "operator" in sides:  # but this takes seconds
            sides["operator"].with_gradient()
        held: dict[str, Tensor] = {}

        def forward(name: str) -> None:
            held[name] = sides[name].run()

        def backward(name: str) -> None:
            sides[name].backward(held.pop(name))

        runs: dict[str, Callable[[], None]] = {}
        for name in sides:
            runs[name] = functools.partial(forward, name)
            runs[f"{name} backward"] = functools.partial(backward, name)
        seconds = interleaved(self._repeats, warm_ups, self._clock, **runs)
        return {name: (median(seconds[name]), median(seconds[f"{name} backward"])) for name in sides}

    def _optimizer(self) -> float:
        weight = torch.nn.Parameter(torch.zeros(2**26, device=self._device, dtype=self._dtype))
        weight.grad = torch.ones_like(weight)
        optimizer = torch.optim.AdamW([weight], lr=1e-5, fused=True)
        seconds = interleaved(self._repeats, 1, self._clock, step=optimizer.step)["step"]
        return median(seconds) / weight.numel()

    def curves(self) -> list[dict[str, Any]]:
        """Seconds of layers at smaller widths."""
        task = self._progress.add_task("curves", total=len(CURVE_WIDTHS) * len(CURVE_LENGTHS))
        rows = []
        for width in CURVE_WIDTHS:
            layers = Layers(widths(width), self._device)
            for length in CURVE_LENGTHS:
                passes = self._passes(f"width {width}", layers.sides(length, gradient=True, torchs=True), length)
                row = {name.removesuffix("_layer"): each.step(again=False) for name, each in passes.items()}
                rows.append({"width": width, "tokens": length, **row})
                self._progress.advance(task)
        return rows


@functools.cache
def parameters(kind: str) -> int:
    """Numbers of an "attention" or a "hyena" layer, or of the "rest" of a model."""
    with torch.device("meta"):
        model = StripedHyenaForCausalLM(configuration(WIDTH, 2, 2))
    hyena, attention = (sum(p.numel() for p in block.parameters()) for block in model.backbone.blocks)
    rest: int = sum(p.numel() for p in model.parameters()) - attention - hyena
    return {"attention": attention, "hyena": hyena, "rest": rest}[kind]


def flops(attention: int, hyena: int, tokens: int, *, again: bool) -> float:
    """Multiplications and additions of a step's products: weights three times, attention's own three and a half, both
    once more where activations are made again (but for the MLP's last), and logits three times.
    """
    config = configuration(WIDTH, 2, 2)
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    mlp, mixers = 3 * WIDTH * config.mlp_size, (WIDTH * (rows + WIDTH), WIDTH * 4 * WIDTH)
    weights = attention * (mixers[0] + mlp) + hyena * (mixers[1] + mlp)
    taken = weights * (3 + again) - again * (attention + hyena) * WIDTH * config.mlp_size
    core = attention * 4 * tokens**2 / 2 * WIDTH * (3.5 + again)
    return 2 * tokens * taken + core + 2 * tokens * WIDTH * config.vocab_size * 3


def _composed(whole: list[dict[str, Any]], parts: dict[str, Any]) -> dict[str, Any]:
    """Steps made of parts, beside those that were taken whole; and the 7B's in each pattern."""
    seconds, counts_of = _by_length(parts), parts["parameters"]

    def step(attention: int, hyena: int, tokens: int, again: bool, core: str = "core") -> float:
        made = parts["optimizer_s_a_parameter"]
        total: float = tokens / BASE * seconds["head"][BASE].step(again=False)
        total += made * (attention * counts_of["attention"] + hyena * counts_of["hyena"] + counts_of["rest"])
        total += attention * _layer_s(seconds, core, tokens, again)
        return total + hyena * _layer_s(seconds, "operator", tokens, again)

    checked = []
    for row in whole:
        if row["median_s"] is None or row["model"] == TRANSFORMERS:
            continue
        attention = row["layers"] // (2 if row["model"] == STRIPED else 1)
        core = "core" if row["model"] == STRIPED else "llama_core"
        composed_s = step(attention, row["layers"] - attention, row["tokens"], row["again"], core)
        named = {key: row[key] for key in ("model", "tokens", "median_s")}
        checked.append({**named, "composed_s": composed_s, "error": composed_s / row["median_s"] - 1})
    slices, patterns = [], []
    for tokens in COMPOSED:
        again = parts["makes_again"][str(tokens)]
        slices.append({"tokens": tokens, "again": again, **_against(step, (1, 1), tokens, again)})
        for name, (layers, every) in PATTERNS.items():
            row = {"pattern": name, "layers": layers, "tokens": tokens, "bound": every}
            patterns.append({**row, **_against(step, (layers // every, layers - layers // every), tokens, True)})
    return {"checked": checked, "slices": slices, "patterns": patterns}


def _by_length(parts: dict[str, Any]) -> dict[str, dict[int, Passes]]:
    measured = parts["seconds"].items()
    return {name: {int(at): Passes(**passes) for at, passes in some.items()} for name, some in measured}


def _layer_s(seconds: dict[str, dict[int, Passes]], mixer: str, tokens: int, again: bool) -> float:
    """Of a layer with this mixer ("core", "llama_core" or "operator"): what it does with each position, so many times,
    and its mixer at that length.
    """
    layer, over = ("hyena_layer", mixer) if mixer == "operator" else ("attention_layer", "core")
    by_position = seconds[layer][BASE].step(again) - seconds[over][BASE].step(again)
    by_position -= again * seconds["last_product"][BASE].forward
    return tokens / BASE * by_position + seconds[mixer][tokens].step(again)


def _against(step: Callable[..., float], counts: tuple[int, int], tokens: int, again: bool) -> dict[str, float]:
    """A StripedHyena of so many attention and Hyena layers beside a Llama of as many; and beside one whose attention is
    ours.
    """
    llama, striped_s = (sum(counts), 0), step(*counts, tokens, again)
    llama_s = step(*llama, tokens, again, "llama_core")
    return {
        "llama_s": llama_s,
        "striped_s": striped_s,
        "ratio": llama_s / striped_s,
        "by_pattern": step(*llama, tokens, again) / striped_s,
        "by_flops": flops(*llama, tokens, again=again) / flops(*counts, tokens, again=again),
    }


def ratio(rows: Sequence[dict[str, Any]], tokens: int) -> float | None:
    """Llama's median over the StripedHyena's, of whole steps on so many tokens; None where one was not taken."""
    found = {row["model"]: row["median_s"] for row in rows if row["tokens"] == tokens}
    ours, theirs = found.get(STRIPED), found.get(LLAMA)
    return None if ours is None or theirs is None else theirs / ours


def _table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, {figures['dtype']}, torch {here['torch']}, {here['commit']}; "
        f"device {figures['device']}, Hyena operator by {figures['backend']}",
        f"multiplies {figures['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s; batch 1, the 7B's widths, heads of {HEAD_WIDTH}",
        "",
        f"{'whole steps':24}{'layers':>7}{'tokens':>9}{'seconds':>9}{'from':>9}{'to':>9}{'GFLOP/s':>9}  activations",
    ]
    for row in figures["whole"]:
        runs = row["seconds"]
        taken = f"   too little memory{'':8}"
        if runs:
            rate = row["flop"] / row["median_s"] / 1e9
            taken = f"{row['median_s']:>9.1f}{min(runs):>9.1f}{max(runs):>9.1f}{rate:>9.0f}"
        kept = "made again" if row["again"] else "kept"
        lost = figures["repeats"] - len(runs) if runs else 0
        some = f"; too little memory in {lost} more" if lost else ""
        lines.append(f"{row['model']:24}{row['layers']:>7}{row['tokens']:>9}{taken}   {kept}{some}")
    for tokens in sorted({row["tokens"] for row in figures["whole"]}):
        if (found := ratio(figures["whole"], tokens)) is not None:
            lines.append(f"  at {tokens:,} tokens the StripedHyena's step is {found:.2f}x as fast")
    lines += ["", "composed of parts, against the whole:"]
    lines += [
        f"  {row['model']:22}{row['tokens']:>9}{row['composed_s']:>9.1f} s, {row['error']:+.1%}"
        for row in figures["checked"]
    ]
    lines += [
        "",
        "two layers, 1 of 2 attention, composed: times as fast as the Llama, as one with our attention, by arithmetic",
    ]
    lines += [
        f"  {row['tokens']:>9,}{row['ratio']:>7.2f}x{row['by_pattern']:>7.2f}x{row['by_flops']:>7.2f}x"
        f"   activations {'made again' if row['again'] else 'kept'}"
        for row in figures["slices"]
    ]
    lines += [
        "",
        "whole models, composed, activations made again: times as fast as the Llama, as one with our attention, by",
        "arithmetic alone, and what no length passes where attention is alike",
    ]
    lines += [
        f"  {row['pattern']:9}{row['layers']:>4} layers{row['tokens']:>9,}{row['ratio']:>7.2f}x"
        f"{row['by_pattern']:>7.2f}x{row['by_flops']:>7.2f}x{row['bound']:>5}x"
        for row in figures["patterns"]
    ]
    lines += [
        "",
        "layers alone, activations kept, by length over width: an attention layer's time over a Hyena layer's, torch's",
        f"attention and ours (composed where the width is {WIDTH})",
    ]
    lines += [
        f"  {place.length_over_width:>6.1f} (width {place.width}){place.llama:>7.2f}x{place.attention:>7.2f}x"
        for place in _curve(figures)
    ]
    resumed = f"; {figures['resumed']} measurements of earlier runs that were cut" if figures["resumed"] else ""
    lines += ["", f"medians of {figures['repeats']} in turn; core: {figures['parts']['core_measured']}{resumed}"]
    return "\n".join(lines)


class _Place(NamedTuple):
    """Seconds of an attention layer, by torch's kernels and by ours, over those of a Hyena layer."""

    length_over_width: float
    width: int
    llama: float
    attention: float


def _curve(figures: dict[str, Any]) -> list[_Place]:
    """Of every length that was measured or composed."""
    places = [
        _Place(row["tokens"] / row["width"], row["width"], row["llama"] / row["hyena"], row["attention"] / row["hyena"])
        for row in figures["curves"]
    ]
    seconds = _by_length(figures["parts"])
    for tokens in COMPOSED:
        llama, attention, hyena = (
            _layer_s(seconds, mixer, tokens, False) for mixer in ("llama_core", "core", "operator")
        )
        places.append(_Place(tokens / WIDTH, WIDTH, llama / hyena, attention / hyena))
    return sorted(places)


def _plot(figures: dict[str, Any], path: Path) -> None:
    series: dict[str, list[tuple[float, float]]] = {}
    for place in _curve(figures):
        for name, (_, every) in PATTERNS.items():
            times = every * place.llama / (place.attention + every - 1)
            series.setdefault(f"width {place.width}, {name}", []).append((place.length_over_width, times))
    plot(path, series, "layers, activations kept: times as fast in training", "tokens over width", "times", log_x=True)

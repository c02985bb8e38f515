"""A whole checkpoint of random weights in the published 7B's layout, written, and loaded in a process of its own, as it
is and with weights of 8 and of 4 bits: whether all of it is used, what it takes, and how fast the model then reads and
writes.

15.3 GB on the disk while it runs, and as much memory. `published_7b.json` is the config.json of StripedHyena-Nous-7B.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Generator, Tensor

from stripedrag.errors import StoreError
from stripedrag.eval.bench.report import Report, machine
from stripedrag.eval.meter import resident_bytes
from stripedrag.model import StripedHyenaConfig, StripedHyenaForCausalLM, new_cache
from stripedrag.model.generation import Sampling, decode, prefill
from stripedrag.model.identity import tensors_sha256
from stripedrag.model.memory import free_bytes
from stripedrag.model.quantization import QUANTIZATIONS, Quantization, QuantizationConfig, QuantizedLinear
from stripedrag.weights import cache_dir

PUBLISHED = Path(__file__).with_name("published_7b.json")
SHARD_BYTES = 5 * 10**9
PROMPT_TOKENS, ANSWER_TOKENS = 512, 16
KINDS: tuple[Quantization | None, ...] = (None, "int8", "int4")


def run(repeats: int) -> Report:
    """Seconds and peak private memory of loading, in as many processes of each kind, and of a prompt and a reply, with
    their tokens/s.
    """
    config = published()
    folder = cache_dir() / "bench" / "load"
    shutil.rmtree(folder, ignore_errors=True)
    needed, free = sum(_nbytes(tensor) for _, tensor in layout(config)), _free(folder)
    if needed > (memory := free_bytes(torch.device("cpu"))):
        raise StoreError(f"the model takes {needed / 1e9:.1f} GB of memory, and {memory / 1e9:.1f} are free")
    if free < 1.05 * needed:
        raise StoreError(f"the checkpoint takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free for {folder}")
    try:
        digests = write(folder, config)
        asked = [quantize for _ in range(repeats) for quantize in KINDS]
        rows = [_loaded(folder, digests, kind) for kind in track(asked, "loading", console=Console(stderr=True))]
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {
        "bench": "load",
        "machine": machine(),
        "repeats": repeats,
        "tensors": len(digests),
        "file_bytes": size,
        "rows": rows,
    }
    return Report(figures, _table(figures))


def published() -> dict[str, Any]:
    """The config.json of the published 7B."""
    config: dict[str, Any] = json.loads(PUBLISHED.read_text())
    return config


def layout(config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Names and empty tensors (device "meta") of a published checkpoint, in bfloat16 but for what stays float32."""
    with torch.device("meta"):
        model = StripedHyenaForCausalLM(StripedHyenaConfig(**config)).to(torch.bfloat16)
    rotary = torch.empty(model.config.head_dim // 2, device="meta")
    for name, tensor in model.state_dict().items():
        if name.endswith("unembed.weight") and model.config.tie_embeddings:
            continue
        yield name, tensor
        if name.endswith("inner_mha_cls.out_proj.weight"):
            yield name.replace("out_proj.weight", "rotary_emb.inv_freq"), rotary


def write(folder: Path, config: dict[str, Any], *, shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """A checkpoint in that layout, sharded, with its index and config; the sha256 of each tensor by its name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    empty = dict(layout(config))
    shards = _shards(empty, shard_bytes)
    random = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    digests: dict[str, str] = {}
    for number, names in enumerate(track(shards, "writing", console=Console(stderr=True)), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _filled(name, empty[name], random) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        digests |= {name: tensors_sha256({name: tensor}) for name, tensor in tensors.items()}
    index = {"metadata": {"total_size": sum(map(_nbytes, empty.values()))}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return digests


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names in their order, in groups of at most so many bytes where one tensor is no more."""
    shards, room = [list[str]()], shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and _nbytes(tensor) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= _nbytes(tensor)
    return shards


def _filled(name: str, empty: Tensor, random: Generator) -> Tensor:
    """Random numbers with which the network's stay finite: norms near one, poles inside the unit circle."""
    tensor = torch.empty(empty.shape, dtype=empty.dtype).normal_(generator=random)
    if name.endswith("scale"):
        return tensor.mul_(0.1).add_(1)
    if name.endswith("poles"):
        return tensor.mul_(0.2)
    return tensor.mul_(0.02)


def load(folder: Path, quantize: Quantization | None) -> dict[str, Any]:
    """What loading takes in this process, the sha256 of each tensor that is used as it is, and the model's speed."""
    kind = {} if quantize is None else {"quantization_config": QuantizationConfig(QUANTIZATIONS[quantize])}
    with _Peak() as peak:
        start = time.perf_counter()
        model = StripedHyenaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kind).eval()
        seconds = time.perf_counter() - start
    ids = torch.arange(PROMPT_TOKENS)[None] % model.config.vocab_size
    cache = new_cache(model.config)
    with _Peak() as peak_in_use:
        start = time.perf_counter()
        logits = prefill(model, ids, cache)
        read = time.perf_counter()
        made = list(decode(model, logits, cache, max_new_tokens=ANSWER_TOKENS + 1, stop_ids=(), sampling=Sampling()))
        end = time.perf_counter()
    small = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    parts = {f"{name}.{part}" for name in small for part in ("weight", "scale", "offset")}
    return {
        "quantize": quantize,
        "quantized": [f"{name}.weight" for name in small],
        "load_s": seconds,
        "weight_bytes": sum(tensor.nbytes for tensor in model.parameters()),
        "peak_own_bytes": peak.bytes,
        "peak_own_bytes_in_use": peak.bytes + peak_in_use.bytes,
        "finite": bool(logits.isfinite().all()),
        "prefill_tokens_per_s": PROMPT_TOKENS / (read - start),
        "decode_tokens_per_s": (len(made) - 1) / (end - read),
        "digests": {
            name: tensors_sha256({name: tensor.detach()})
            for name, tensor in model.named_parameters()
            if name not in parts
        },
    }


class _Peak:
    """The most private memory, beyond what there was before, that this process has in the block."""

    def __enter__(self) -> "_Peak":
        self._before = self._most = _own_bytes()
        self._ended = Event()
        self._watch = Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._watch.join()
        self.bytes = max(self._most, _own_bytes()) - self._before

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self._most = max(self._most, _own_bytes())


def _loaded(folder: Path, digests: dict[str, str], quantize: Quantization | None = None) -> dict[str, Any]:
    """What `load` gives in a process of its own, and of how many tensors what is used is what was written, or was made
    small.
    """
    command = [sys.executable, "-m", "stripedrag.eval.bench.load", str(folder), quantize or ""]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    if done.returncode:
        raise StoreError(f"the process that loads the model ended with {done.returncode}; -9 is for want of memory")
    row: dict[str, Any] = json.loads(done.stdout)
    used, quantized = row.pop("digests"), row.pop("quantized")
    wrong = [name for name, digest in used.items() if digests[name] != digest]
    unused = [name for name in digests.keys() - used.keys() - {*quantized} if not name.endswith("inv_freq")]
    counts = {"tensors_used": len(used) + len(quantized), "quantized": len(quantized)}
    return row | counts | {"wrong": wrong, "unused": sorted(unused)}


def _own_bytes() -> int:
    return resident_bytes().get("own", 0)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _free(folder: Path) -> int:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(folder.parent).free


def _table(figures: dict[str, Any]) -> str:
    here, rows = figures["machine"], figures["rows"]
    right = all(not one["wrong"] and not one["unused"] and one["finite"] for one in rows)
    groups = {kind: [one for one in rows if one["quantize"] == kind] for kind in KINDS}

    def line(label: str, value: Callable[[dict[str, Any]], float], form: str) -> str:
        return f"{label:38}" + "".join(f"{median(map(value, group)):>10{form}}" for group in groups.values())

    return "\n".join(
        [
            f"{here['processor']}, {here['threads']} threads, torch {here['torch']}, {here['commit']}",
            f"random weights in the layout of StripedHyena-Nous-7B, {figures['file_bytes'] / 1e9:.2f} GB of files with "
            f"{figures['tensors']} tensors",
            "",
            f"{'':38}" + "".join(f"{kind or 'bfloat16':>10}" for kind in groups),
            line("tensors in use", lambda row: row["tensors_used"], ".0f")
            + ("  all but inv_freq, to the bit where not quantized" if right else "  WRONG"),
            line("  quantized", lambda row: row["quantized"], ".0f"),
            line("weights, GB", lambda row: row["weight_bytes"] / 1e9, ".2f"),
            line("loaded in, s", lambda row: row["load_s"], ".1f"),
            line("peak of private memory, of weights", lambda row: row["peak_own_bytes"] / row["weight_bytes"], ".3f"),
            line("  prompt and reply included, GB", lambda row: row["peak_own_bytes_in_use"] / 1e9, ".2f"),
            line(f"a prompt of {PROMPT_TOKENS}, tokens/s", lambda row: row["prefill_tokens_per_s"], ".1f"),
            line(f"a reply of {ANSWER_TOKENS}, tokens/s", lambda row: row["decode_tokens_per_s"], ".2f"),
            line("  limit by reading the weights", lambda row: here["read_bytes_per_s"] / row["weight_bytes"], ".2f"),
            "",
            f"Medians of {figures['repeats']} processes of each. inv_freq is in the files and computed anew.",
        ]
    )


if __name__ == "__main__":
    kind: Any = sys.argv[2] or None
    print(json.dumps(load(Path(sys.argv[1]), kind)))

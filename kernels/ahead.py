"""Compiles the Triton kernels for GPUs that need not be there, and says what each takes of registers and memory.

    python -m stripedrag.kernels.ahead --capability 80 90 --to build/triton.md

A kernel that uses stack has spilled registers to memory, in the loop over time, for every thread.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from stripedrag.kernels import gpu

CAPABILITIES = (80, 90, 100)
MODES, TAPS, DTYPES = (2, 8, 16), (3,), ("bf16", "fp32")  # the 7B's and Evo's filters, and the largest
_ELEMENTS = ("z", "before", "dy", "y", "dz", "dbefore", "fir_state")
_SIZES = ("L", "H", "W", "G", "C", "row_stride", "rows", "first", "step")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


class Compiled(NamedTuple):
    """What one kernel takes in one configuration: registers a thread, bytes of stack a thread and of shared memory a
    program.
    """

    kernel: str
    capability: int
    dtype: str
    modes: int
    taps: int
    masked: bool
    block: int
    rows: int
    warps: int
    registers: int
    stack: int
    shared: int


def compiled(
    capability: int, *, dtype: str = "bf16", modes: int = 2, taps: int = 3, masked: bool = False
) -> Iterator[Compiled]:
    """Every kernel in every configuration that autotuning may choose, for one kind of filter.

    Triton's compiler and NVIDIA's assembler, which come with it, are all that it needs: no GPU and no driver.
    """
    given = {"N": modes, "K": taps, "MASKED": masked, "T": 256, "SQUARINGS": 8, "CONJUGATE": True}
    for name in gpu.KERNELS:
        parts = [part for _, part in gpu.input_parts(modes)] if name == "input_gradients" else [{}]
        for chosen, part in product(gpu.configurations(name, modes), parts):
            constants = given | chosen | part
            registers, stack, shared = _resources(name, capability, dtype, constants)
            yield Compiled(
                *(name, capability, dtype, modes, taps, masked),
                *(chosen["BLOCK"], chosen.get("ROWS", 1), chosen["num_warps"]),
                *(registers, stack, shared),
            )


def _resources(name: str, capability: int, dtype: str, constants: dict[str, Any]) -> tuple[int, int, int]:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = gpu.function(name)
    constants = constants | {"WORK": tl.float64 if dtype == "fp64" else tl.float32}
    work = "fp64" if dtype == "fp64" else "fp32"
    signature, attributes = {}, {}
    for place, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in _SIZES:
            signature[argument] = "i32"
        elif argument == "batch_stride":
            signature[argument] = "i64"
        elif argument == "real":
            signature[argument] = "*u8"
        else:
            signature[argument] = f"*{dtype if argument in _ELEMENTS else work}"
        if signature[argument].startswith("*") or argument in ("H", "W", "row_stride", "batch_stride"):
            attributes[place,] = [["tt.divisibility", 16]]  # as of tensors of usual widths
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(key),): value for key, value in constants.items() if key in signature},
        attrs=attributes,
    )
    options = {"num_warps": constants["num_warps"], "enable_fp_fusion": True, "num_stages": 1}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        told = subprocess.run([dump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = _RESOURCES.search(told.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of {name}'s registers: {told.stdout}{told.stderr}")
    registers, stack, shared = map(int, found.groups())
    return registers, stack, max(shared, made.metadata.shared)


def table(rows: list[Compiled]) -> str:
    """A Markdown table, a line for a kernel on a device with a filter: the range over its configurations."""
    groups: dict[tuple[Any, ...], list[Compiled]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.capability, row.dtype, row.modes, row.taps, row.masked), []).append(row)
    lines = [
        "| kernel | sm | z | modes | taps | mask | configurations | registers | stack | shared |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (kernel, capability, dtype, modes, taps, masked), group in groups.items():
        counts = sorted({row.registers for row in group})
        registers = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        stack, shared = max(row.stack for row in group), max(row.shared for row in group)
        lines.append(
            f"| {kernel} | {capability} | {dtype} | {modes} | {taps} | {'yes' if masked else 'no'} | {len(group)} "
            f"| {registers} | {stack} | {shared} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m stripedrag.kernels.ahead", description="Compile for GPUs.")
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES, metavar="SM")
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=("bf16", "fp16", "fp32", "fp64"))
    parser.add_argument("--modes", type=int, nargs="+", default=MODES)
    parser.add_argument("--taps", type=int, nargs="+", default=TAPS)
    parser.add_argument("--mask", type=int, nargs="+", default=(0, 1), choices=(0, 1))
    parser.add_argument("--to", type=Path, help="a file for the table")
    asked = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed; `pip install 'stripedrag[gpu]'` on Linux")
    if gpu.is_interpreted():
        parser.error("TRITON_INTERPRET is set, with which nothing is compiled; unset it")
    rows = []
    for capability, dtype, modes, taps, masked in product(
        asked.capability, asked.dtype, asked.modes, asked.taps, asked.mask
    ):
        for row in compiled(capability, dtype=dtype, modes=modes, taps=taps, masked=bool(masked)):
            rows.append(row)
            print(json.dumps(row._asdict()), flush=True)
    if asked.to is not None:
        asked.to.parent.mkdir(parents=True, exist_ok=True)
        asked.to.write_text(table(rows))
    sys.exit(any(row.stack for row in rows))


if __name__ == "__main__":
    main()

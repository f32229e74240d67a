"""Compile the Triton kernels for GPUs that are not here, and tabulate registers, spills and shared memory.

    python benchmarks/compile_kernels.py [--archs 80 90 100 --dtypes bfloat16 --head_dims 64 128]

No GPU is needed: a stand-in tells Triton which GPU to compile for, and the launches of `attention_forward`,
`query_backward` and `key_backward` on meta tensors compile what a call with such tensors would run, and run nothing.
Nothing is measured: the table says that every variant compiles and fits, not how fast it is.

registers: of one thread. spill_bytes: local memory of one thread, where registers go for which there is no room (four
times Triton's `n_spills`). cuobjdump, which Triton brings, reads both from the binary. shared_bytes: of a program.
"""

import argparse
import csv
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from mmcoconut.kernels import triton_kernels
from mmcoconut.kernels.latent import Split, Step


FILE = Path(__file__).with_name("results") / "compiled_kernels.csv"
# Most bytes of shared memory that a block may have: CUDA C++ Programming Guide, technical specifications per compute
# capability (8.0: 163 KiB; 9.0 and 10.0: 227 KiB).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEAD_DIMS = (64, 96, 128, 256)
# Few rows a kv head and a prefix in many splits; many rows and a prefix in one split.
SHAPES = {
    "few rows": {"batch": 1, "heads": 8, "kv_heads": 8, "queries": 1, "prefix": 3300, "tail": 8},
    "many rows": {"batch": 64, "heads": 28, "kv_heads": 4, "queries": 8, "prefix": 300, "tail": 8},
}
KERNELS = ("_forward_kernel", "_merge_kernel", "_query_gradient_kernel", "_sum_kernel", "_key_gradient_kernel")


class Variant(NamedTuple):
    """What a call is compiled for; shape is a name of SHAPES."""

    arch: int
    dtype: str
    head_dim: int
    shape: str
    masked: bool


class AbsentGPU:
    """Stands in for Triton's driver: a GPU of this compute capability, on which nothing can be launched."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by the number of the device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


class Compiler:
    """Stands in for a kernel: each launch compiles it and appends (name, constants, compiled kernel) to a list."""

    def __init__(self, name: str, kernel, compiled: list):
        self.name, self.kernel, self.compiled = name, kernel, compiled

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.compiled.append((self.name, constants, self.kernel.warmup(*args, grid=grid, **constants)))

        return launch


@contextmanager
def compiling_for(arch: int) -> Iterator[list]:
    """Let launches compile for this compute capability; yield the list of what they compiled."""
    from triton.runtime import driver

    compiled, before = [], driver._active
    stand_ins = {name: Compiler(name, getattr(triton_kernels, name), compiled) for name in KERNELS}
    driver.set_active(AbsentGPU(arch))
    try:
        with mock.patch.multiple(triton_kernels, **stand_ins):
            yield compiled
    finally:
        driver.set_active(before)


def launch_all(variant: Variant) -> None:
    """Call all three functions once, on meta tensors of this variant."""
    sizes, head_dim = SHAPES[variant.shape], variant.head_dim

    def states(heads: int, length: int) -> torch.Tensor:
        return torch.empty(sizes["batch"], heads, length, head_dim, dtype=DTYPES[variant.dtype], device="meta")

    query = states(sizes["heads"], sizes["queries"])
    key, value = (
        Split(*(states(sizes["kv_heads"], length) for length in (sizes["prefix"], sizes["tail"]))) for _ in range(2)
    )
    length = sizes["prefix"] + sizes["tail"]
    mask = torch.empty(sizes["batch"], 1, sizes["queries"], length, dtype=torch.bool, device="meta")
    step = Step(query, head_dim**-0.5, mask if variant.masked else None)
    output, logsumexp = triton_kernels.attention_forward(step, key, value)
    grad_output = torch.empty_like(output)
    _, delta = triton_kernels.query_backward(step, key, value, grad_output, output, logsumexp)
    of_prefix = step._replace(mask=None if step.mask is None else step.mask[..., : sizes["prefix"]])
    triton_kernels.key_backward(of_prefix, key.prefix, value.prefix, grad_output, logsumexp, delta)


def resources(kernel) -> dict[str, int]:
    """Return registers and bytes of stack of one thread, out of a compiled kernel's binary."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", said).groups()
    return {"registers": int(registers), "spill_bytes": int(stack) + int(local)}


def rows_of(variant: Variant) -> list[dict]:
    """Compile a variant, and return a row of each kernel."""
    with compiling_for(variant.arch) as compiled:
        launch_all(variant)
    rows = []
    for name, constants, kernel in compiled:
        reads_keys = "KEYS" in constants  # the others take neither mask nor rows
        row = {"kernel": name.strip("_"), "arch": f"sm_{variant.arch}", "dtype": variant.dtype}
        row |= {"head_dim": variant.head_dim, "masked": variant.masked if reads_keys else ""}
        row |= {column: constants.get(column, "") for column in ("ROWS", "KEYS", "PARTS")}
        row |= {"num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages}
        rows.append(row | resources(kernel) | {"shared_bytes": kernel.metadata.shared})
    return rows


def variants(*, archs=tuple(SHARED_LIMITS), dtypes=tuple(DTYPES), head_dims=HEAD_DIMS) -> list[Variant]:
    """Return every variant of these compute capabilities, dtypes and head dims."""
    return [Variant(*each) for each in itertools.product(archs, dtypes, head_dims, SHAPES, (False, True))]


def name_of(row: dict) -> tuple[str, ...]:
    """Return what tells a row from all others: every column but what was found."""
    return tuple(str(value) for name, value in row.items() if name not in FOUND)


FOUND = ("registers", "spill_bytes", "shared_bytes", "triton")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", type=int, nargs="+", choices=SHARED_LIMITS, default=[*SHARED_LIMITS])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--head_dims", type=int, nargs="+", default=[*HEAD_DIMS])
    parser.add_argument("--file", type=Path, default=FILE, help="the CSV to write")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    chosen = {name: getattr(arguments, name) for name in ("archs", "dtypes", "head_dims")}
    rows = {}
    for variant in variants(**chosen):
        found = rows_of(variant)
        rows |= {name_of(row): row | {"triton": triton_kernels.triton.__version__} for row in found}
        print(variant, max(row["spill_bytes"] for row in found), "bytes spilled at most", flush=True)
    rows = [*rows.values()]
    with arguments.file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=[*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    spilling = [row for row in rows if row["spill_bytes"]]
    most = max(row["shared_bytes"] for row in rows)
    print(f"{len(rows)} kernels in {arguments.file}: {len(spilling)} spill, shared memory at most {most} bytes")


if __name__ == "__main__":
    main()

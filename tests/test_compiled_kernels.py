"""The Triton kernels compile for GPUs that are not here, and benchmarks/results/compiled_kernels.csv is of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest


triton = pytest.importorskip("triton", reason="compiling Triton's kernels needs triton, which is made for Linux")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import compile_kernels  # noqa: E402
from compile_kernels import FOUND, KERNELS, SHARED_LIMITS, Variant, launch_all, name_of, variants  # noqa: E402
from tables import read_rows  # noqa: E402

from mmcoconut.kernels import triton_kernels  # noqa: E402


ROWS = {name_of(row): row for row in read_rows(compile_kernels.FILE)}
# One of each kind of GPU, dtype and shape; the last takes the most shared memory of all.
COMPILED = [
    Variant(80, "bfloat16", 128, "many rows", True),
    Variant(90, "bfloat16", 64, "few rows", False),
    Variant(100, "float32", 256, "many rows", True),
]


class Constants:
    """Stands in for a kernel, and notes the constants of a launch."""

    def __init__(self, name: str, launched: list):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launched.append((self.name.strip("_"), constants))


def tools() -> str | None:
    """Return what is missing to compile, or None."""
    try:
        paths = [triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.cuobjdump.path]
    except (AttributeError, RuntimeError) as error:
        return str(error)
    return next((f"{path} is missing" for path in paths if not Path(path).exists()), None)


def test_the_table_has_every_variant_with_the_blocks_that_are_chosen_now():
    expected = set()
    for variant in variants():
        launched = []
        stand_ins = {name: Constants(name, launched) for name in KERNELS}
        with mock.patch.multiple(triton_kernels, **stand_ins):
            launch_all(variant)
        for name, constants in launched:
            masked = str(variant.masked) if "KEYS" in constants else ""
            blocks = tuple(str(constants.get(column, "")) for column in ("ROWS", "KEYS", "PARTS"))
            expected.add((name, f"sm_{variant.arch}", variant.dtype, str(variant.head_dim), masked, *blocks))
    columns = ("kernel", "arch", "dtype", "head_dim", "masked", "ROWS", "KEYS", "PARTS")
    assert {tuple(row[column] for column in columns) for row in ROWS.values()} == expected


def test_every_variant_fits_its_gpu_and_spills_four_registers_at_most():
    for row in ROWS.values():
        arch = int(row["arch"].removeprefix("sm_"))
        assert 0 < int(row["registers"]) <= 255 and 0 <= int(row["shared_bytes"]) <= SHARED_LIMITS[arch], row
        assert 0 <= int(row["spill_bytes"]) <= 16, row


@pytest.mark.slow
@pytest.mark.skipif(tools() is not None, reason=f"Triton's compiler is not whole: {tools()}")
@pytest.mark.parametrize("variant", COMPILED, ids=lambda variant: f"sm_{variant.arch} {variant.dtype}")
def test_kernels_compile_without_a_gpu_to_what_the_table_says(variant, tmp_path):
    """In a process of their own: where Triton's interpreter ran before, it has replaced parts of the language."""
    program = f"import json, compile_kernels as c; print(json.dumps(c.rows_of(c.Variant(*{tuple(variant)}))))"
    paths = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {row["kernel"] for row in found} == {name.strip("_") for name in KERNELS}
    for row in found:
        assert row["shared_bytes"] <= SHARED_LIMITS[variant.arch]
        noted = ROWS[name_of(row)]
        if noted["triton"] == triton.__version__:  # another release may count otherwise
            assert {name: str(row[name]) for name in FOUND[:3]} == {name: noted[name] for name in FOUND[:3]}


def test_the_stand_in_leaves_tritons_driver_as_it_was():
    from triton.runtime import driver

    before = driver._active
    with pytest.raises(ZeroDivisionError), compile_kernels.compiling_for(80):
        raise ZeroDivisionError
    assert driver._active is before

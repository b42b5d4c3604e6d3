"""The Triton kernels compiled for real chips, in processes that do not interpret them."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import kernel_report

pytest.importorskip("triton")
# The tensor-core instruction of each chip.
UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
STREAMING = re.compile("project_kernel|back_kernel|gram_kernel")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    if not kernel_report.can_compile():
        pytest.skip("this Triton takes constants and alignment in another way")
    return kernel_report.compile_all(tuple(UNITS))


@pytest.mark.slow
@pytest.mark.parametrize("arch", UNITS)
def test_kernels_of_every_launch_table_entry_compile_without_faults(arch: str, records: list[dict]):
    ours = [record for record in records if record["arch"] == arch]
    assert kernel_report.faults(ours) == []
    streaming = [record for record in ours if STREAMING.search(record["kernel"])]
    tiles = {(r["kernel"], r["tokens"], *r["tile"]) for r in streaming}
    # widths, kernels, tokens (bfloat16 with rows and without); gram: splits, tokens
    assert len(tiles) == 3 * 2 * 3 + 2 * 2
    assert all(set(record["tensor_core"]) == {UNITS[arch]} for record in streaming)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, the launchers themselves run")
def test_launchers_run_up_to_the_launch(tmp_path: Path):
    script = Path(__file__).with_name("launch_path.py")
    # Triton 3.7 on Python 3.13 warns when it rebuilds an annotated assignment
    strict = ["-W", "error", "-W", "ignore:AnnAssign.__init__ missing:DeprecationWarning"]
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *strict, str(script), "sm_90"],
        env=kept | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = json.loads(done.stdout.splitlines()[-1])
    # 3 token dtypes, with and without rows, each with and without native code, and a sketch with
    # two other sizes, three times; prepare only for bfloat16, collect in both ops
    assert Counter(compiled) == {
        "prepare_kernel": 10, "project_kernel": 30, "finish_kernel": 30, "back_kernel": 30,
        "gram_kernel": 12, "collect_kernel": 42,
    }  # fmt: skip


def test_faults_are_reported():
    good = {
        "arch": "sm_90", "kernel": "back_kernel Q=64", "tokens": "bf16", "tile": [64, 128],
        "stack": 0, "shared": 1000, "shared_limit": 2000, "tensor_core": {"wgmma": 8},
        "in_flight": 0, "exchanged": 0, "early": False,
    }  # fmt: skip
    assert kernel_report.faults([good]) == []
    for change, message in (
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 2001}, "2001 bytes of shared memory"),
        ({"tensor_core": {}}, "no tensor-core instruction"),
        ({"in_flight": 1}, "a tensor-core product still reads its tile"),
        ({"early": True}, "memory is accessed before the wait for the preceding kernel"),
        ({"exchanged": 1}, "an accumulator moves to other threads between two products"),
    ):
        [fault] = kernel_report.faults([good | change])
        assert message in fault


def test_products_in_flight_are_counted():
    product = "%p = ttng.warp_group_dot %a, %b, %c {isAsync = true}\n"
    wait, leave = "%w = ttng.warp_group_dot_wait %p {{pendings = {}}}\n", "scf.yield %w\n"
    assert kernel_report.count_products_in_flight(product + wait.format(0) + leave) == 0
    assert kernel_report.count_products_in_flight(product + wait.format(1) + leave) == 1
    assert (
        kernel_report.count_products_in_flight(product + wait.format(0) + product + leave + leave)
        == 1
    )


def test_layout_exchanges_are_counted():
    change = "%t = ttg.convert_layout %w : tensor<64x128xf32, #mma1> -> tensor<64x128xf32, {}>\n"
    assert kernel_report.count_layout_exchanges(change.format("#mma")) == 1
    assert kernel_report.count_layout_exchanges(change.format("#blocked")) == 0


def test_memory_access_before_the_wait_is_detected():
    wait, read = "griddepcontrol.wait;\n", "ld.global.b32 %r1, [%rd1];\n"
    leave = "griddepcontrol.launch_dependents;\n"
    assert kernel_report.accesses_memory_early(read + wait + leave)
    assert kernel_report.accesses_memory_early(read + leave)
    assert not kernel_report.accesses_memory_early(wait + leave + read)
    assert not kernel_report.accesses_memory_early(
        read
    )  # launched after the preceding kernel has ended


def test_predictions_cover_all_shapes_and_respect_the_roofline():
    rows = kernel_report.predictions()
    assert {(r["N"], r["D"]) for r in rows} == set(kernel_report.SHAPES)
    assert all(r["predicted_us"] >= max(r["microseconds"].values()) for r in rows)

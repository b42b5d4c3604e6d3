"""Launch parameters: their choice by chip, how work is split, and sizes of scratch memory."""

from __future__ import annotations

import functools
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eva_kernels.ops import gram_workspace_bytes, sketch_workspace_bytes

launch = pytest.importorskip("eva_kernels.kernels.launch")
gram = pytest.importorskip("eva_kernels.kernels.gram")
sketch = pytest.importorskip("eva_kernels.kernels.sketch")
sketch_plan = pytest.importorskip("eva_kernels.kernels.sketch_plan")
HOPPER = launch.ARCHS["sm_90"]


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_120"),
        ((12, 1), "sm_120"),
    ],
)
def test_chip_uses_launch_parameters_of_its_family(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(multi_processor_count=7)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(launch, "_launch_failure_reason", lambda: None)
    arch = launch._device_arch.__wrapped__(0)
    assert (arch.name, arch.processors) == (name, 7)
    assert arch.shared_bytes == launch.ARCHS[name].shared_bytes


@pytest.mark.parametrize("name", ["gfx942", "gfx90a"])
def test_amd_chip_is_identified_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=7, gcnArchName=f"{name}:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(launch, "_launch_failure_reason", lambda: None)
    arch = launch._device_arch.__wrapped__(0)
    if name == "gfx942":
        assert (arch.name, arch.processors) == (name, 7)
    else:
        assert arch.startswith("there are no launch parameters for gfx90a; known are sm_80, ")


def test_missing_c_compiler_disables_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the runtime images of PyTorch, since Triton first compiles its driver binding."""

    def fail() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.version, "hip", None)
    properties = SimpleNamespace(multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(launch, "_launch_failure_reason", launch._launch_failure_reason.__wrapped__)
    found = []
    for ask in (fail, lambda: None):
        active = SimpleNamespace(get_current_target=ask)
        monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
        found.append(launch._device_arch.__wrapped__(0))
    assert found[0].endswith("cannot launch (Failed to find C compiler)")
    assert found[1].name == "sm_90"


def test_old_chip_has_no_launch_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "no launch parameters for sm_75" in launch._device_arch.__wrapped__(0)


def test_arch_is_looked_up_by_device_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_device_arch", functools.cache(lambda index: index))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.arch_of(torch.device("cuda", 1)) is HOPPER  # without CUDA, a simulated device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert launch.arch_of(torch.device("cuda", 1)) == 1
    assert launch.arch_of(torch.device("cuda")) == 3
    assert launch.arch_of(torch.device("cpu")) is HOPPER


def test_tile_divides_needs_both_sides() -> None:
    tile = launch.Tile(64, 32, 4, 3)
    assert tile.divides(128, 96)
    assert not tile.divides(127, 96)
    assert not tile.divides(128, 95)


def test_tiles_are_chosen_by_dtype_and_centring() -> None:
    short, wide = launch.Tile(64, 64, 4, 2), launch.Tile(32, 64, 4, 2)
    assert [launch.GramTiles(short, wide).for_itemsize(size) for size in (2, 4)] == [short, wide]
    tiles = [launch.Tile(16 * i, 64, 4, 2) for i in (1, 2, 3, 4)]
    found = launch.SketchTiles(*tiles)
    assert (found.project_and_back(False), found.project_and_back(True)) == (
        (tiles[0], tiles[1]),
        (tiles[2], tiles[3]),
    )
    assert launch.pipeline_stages(short, False, HOPPER) == 2
    assert launch.pipeline_stages(short, True, HOPPER) == 4
    assert launch.pipeline_stages(short, True, launch.ARCHS["gfx942"]) == 2


@pytest.mark.parametrize(
    ("block_n", "block_d", "warps", "itemsize", "rows"),
    [(64, 64, 4, 2, 4), (64, 64, 4, 4, 8), (16, 64, 8, 2, 1), (32, 512, 1, 4, 32)],
)
def test_rows_per_thread(block_n: int, block_d: int, warps: int, itemsize: int, rows: int) -> None:
    tile = launch.Tile(block_n, block_d, warps, 2)
    assert launch.rows_per_thread(tile, itemsize) == rows


@pytest.mark.parametrize(
    ("programs", "rounds", "most", "splits"),
    [
        (15, 10, 4, 2),  # three waves of five rounds, instead of two of ten without splits
        (1, 105, 10, 9),  # twelve rounds, a tenth longer than eleven
        (1, 90, 10, 10),  # nine rounds, as ten would be more than a tenth longer
        (10, 8, 8, 1),
        (1, 3, 8, 3),
        (1, 8, 0, 1),
    ],
)
def test_splits_fill_the_processors(programs: int, rounds: int, most: int, splits: int) -> None:
    arch, tile = launch.replace(HOPPER, processors=10), launch.Tile(64, 64, 8, 2)
    assert launch.splits_to_fill(programs, rounds, most, tile, arch) == splits
    smaller = launch.Tile(64, 64, 4, 2)  # two of these fill a processor
    assert launch.splits_to_fill(2 * programs, rounds, most, smaller, arch) == splits


def test_dependent_wait_needs_support_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "nothing": SimpleNamespace(),
        "fails": SimpleNamespace(gdc_wait=lambda _builder=None: None),
        "waits": SimpleNamespace(gdc_wait=lambda _semantic=None: None),
    }
    for name, cuda in found.items():
        monkeypatch.setattr(launch, "cuda", cuda)
        assert launch._can_compile_wait() == (name == "waits")


@pytest.mark.parametrize("early", [True, False])
def test_compile_options(early: bool) -> None:
    arch = launch.replace(HOPPER, dependent_launch=early)
    found = launch.compile_options(arch, 8, 3)
    assert found.pop("launch_pdl", False) is early
    assert found == {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    assert "num_stages" not in launch.compile_options(arch, 8)


def check_parts(plan: Any, numbers: dict[str, int]) -> None:
    """Check that each part holds its four-byte numbers, with less than 256 bytes to spare."""
    assert list(plan.offsets) == list(numbers)
    for (begin, end), count in zip(
        pairwise([*plan.offsets.values(), plan.nbytes]), numbers.values(), strict=True
    ):
        assert begin % 256 == 0
        assert 4 * count <= end - begin < 4 * count + 256


@pytest.mark.parametrize("arch", launch.ARCHS)
@pytest.mark.parametrize("q", [8, 64, 100, 256])
@pytest.mark.parametrize(
    ("n", "d"), [(1, 16), (3000, 64), (64, 11008), (8192, 4096), (777, 1025), (90_000, 700)]
)
def test_sketch_plan_splits_and_parts(n: int, d: int, q: int, arch: str) -> None:
    for centred in (False, True):
        plan = sketch_plan.plan_sketch(n, q, d, centred, launch.ARCHS[arch])
        for splits, blocks, size, whole in (
            (plan.splits_d, plan.blocks_d, plan.project.block_d, d),
            (plan.splits_n, plan.blocks_n, plan.back.block_n, n),
        ):
            # no split is empty, and partial sums take at most half the memory of 16-bit tokens
            assert (splits - 1) * blocks * size < whole <= splits * blocks * size
            assert splits == 1 or 4 * splits * plan.block_q <= whole
        rows, flags, pitch = plan.block_q, -(-d // 64), -(-n // 64) * 64
        programs = -(-pitch // min(32, max(16, 2048 // rows)))
        check_parts(
            plan,
            # A bfloat16 plane takes half as many bytes.
            {"v_high": rows * d // 2, "v_low": rows * d // 2, "vp_parts": flags * rows}
            | {"vp": rows, "flags": flags, "projected": plan.splits_d * rows * pitch}
            | {"p_high": rows * pitch // 2, "p_low": rows * pitch // 2}
            | {"p_sum_parts": programs * rows, "p_sum": rows}
            | {"products_parts": plan.splits_n * rows * d}
            | {"shift_parts": plan.splits_n * d}
            | {"square_parts": plan.splits_n * -(-d // plan.back.block_d)},
        )


@pytest.mark.parametrize(
    ("n", "d"), [(1, 16), (100_000, 64), (64, 4096), (8192, 700), (200_000, 300)]
)
def test_gram_plan_splits_and_parts(n: int, d: int) -> None:
    plan = gram.plan_gram(n, d, 2, HOPPER)
    size = plan.tile.block_n
    assert (
        (plan.splits - 1) * plan.blocks_per_split * size
        < n
        <= plan.splits * plan.blocks_per_split * size
    )
    assert plan.splits == 1 or 4 * plan.splits * d <= n
    assert (plan.splits > 1) == (n > 8000)
    assert (
        gram.plan_gram(100_000, 384, 2, HOPPER).splits == 22
    )  # six tiles each, for 132 processors
    d_blocks = -(-d // plan.tile.block_d)
    parts = {
        "scatter_parts": plan.splits * d * d if plan.splits > 1 else 0,
        "shift_parts": plan.splits * d,
        "square_parts": plan.splits * d_blocks,
    }
    check_parts(plan, parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", launch.ARCHS)
def test_workspace_bytes_equal_those_of_the_launches(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, cpu = launch.ARCHS[name], torch.device("cpu")
    monkeypatch.setattr(launch, "arch_of", lambda device: arch)
    n, d, q = 4000, 40, 32
    taken = gram.gram_sequence(n, d, d, dtype, False, True, arch).nbytes
    assert gram_workspace_bytes(n, d, dtype, cpu) == taken
    taken = sketch.sketch_sequence(n, q, d, d, dtype, False, True, arch).nbytes
    assert sketch_workspace_bytes(n, q, d, dtype, cpu) == taken

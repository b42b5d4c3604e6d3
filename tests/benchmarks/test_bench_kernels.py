"""The kernel and end-to-end benchmarks: checks before timing, timers, derived numbers, tuning."""

import functools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import end_to_end
from bench.kernels import _case, _timing, fold, sketch, tune
from bench.kernels._case import Case, Prepared
from bench.kernels.run import all_cases
from eva_kernels.errors import EvaRuntimeError

CPU = torch.device("cpu")


def prepared(error: float, calls: list[str]) -> Prepared:
    return Prepared(
        competitors={"fast": lambda: calls.append("fast"), "torch": lambda: calls.append("torch")},
        errors={"fast": error, "torch": 0.0},
        limit=1e-5,
        flops=2e9,
        nbytes=1e6,
    )


@pytest.mark.parametrize("error", [2e-5, float("nan"), float("inf")])
def test_wrong_results_are_not_timed(error: float) -> None:
    calls: list[str] = []
    case = Case("sketch", "none", {"N": 1}, lambda device: prepared(error, calls))
    row = _case.measure(case, CPU)
    assert row["status"] == "incorrect"
    assert "fast has a relative error of" in row["reason"]
    assert calls == []
    assert "times" not in row


def test_correct_competitors_are_timed_in_turn() -> None:
    calls: list[str] = []
    case = Case("sketch", "none", {"N": 1}, lambda device: prepared(1e-6, calls))
    row = _case.measure(case, CPU, _timing.Ceilings(1e9, 1e12))
    assert row["status"] == "timed"
    assert calls == ["fast", "torch"] * (len(calls) // 2)
    assert len(calls) >= 8
    assert row["limited_by"] == "arithmetic"
    assert row["floor_ms"] == pytest.approx(2.0)
    assert set(row["over_fast"]) == {"torch"}


def test_failing_case_does_not_stop_the_others() -> None:
    def fail(device: torch.device) -> Prepared:
        raise ValueError("no such shape")

    good = Case("gram", "good", {"N": 1}, lambda device: prepared(0.0, []))
    cases = [Case("gram", "bad", {"N": 1}, fail), good, good]
    saved: list[int] = []
    run = functools.partial(_case.measure_all, device=CPU, ceilings=None)
    rows = run(cases, deadline=time.monotonic() + 60, save=lambda rows: saved.append(len(rows)))
    assert [row["status"] for row in rows] == ["failed", "timed", "timed"]
    assert rows[0]["reason"] == "ValueError: no such shape"
    assert saved == [1, 2, 3]
    rows = run(cases, deadline=time.monotonic() - 1, save=lambda rows: None)
    assert [row["status"] for row in rows] == ["not reached"] * 3


def test_fast_path_on_a_gpu_raises_if_unavailable() -> None:
    def refuse(backend: str) -> None:
        raise EvaRuntimeError("no kernels here")

    with pytest.raises(EvaRuntimeError, match="no kernels here"):
        _case.fast_path("triton", refuse, torch.device("cuda"))
    assert _case.fast_path("triton", refuse, CPU) == "auto"
    assert _case.fast_path("triton", lambda backend: None, torch.device("cuda")) == "triton"


@pytest.mark.parametrize(
    ("seconds", "nbytes", "limited_by", "share"),
    [(2e-3, 1e6, "arithmetic", 0.5), (8e-3, 4e9, "memory", 0.5)],
)
def test_share_of_the_roofline(
    seconds: float, nbytes: float, limited_by: str, share: float
) -> None:
    ceilings = _timing.Ceilings(bytes_per_second=1e12, flops_per_second=1e12)
    found = _timing.rates_and_share(seconds, 1e9, nbytes, ceilings)
    assert found["limited_by"] == limited_by
    assert found["share_of_ceiling"] == pytest.approx(share)
    assert found["gb_s"] == pytest.approx(nbytes / seconds / 1e9)
    assert "share_of_ceiling" not in _timing.rates_and_share(seconds, 1e9, nbytes, None)


def test_number_of_repetitions_is_limited() -> None:
    assert _timing.repetitions(0.1, 1.0, 5, 50) == 10
    assert _timing.repetitions(1.0, 1.0, 5, 50) == 5
    assert _timing.repetitions(1e-6, 1.0, 5, 50) == 50


def test_profiled_events_are_counted_by_kind() -> None:
    events = {
        ("cudaLaunchKernel", False): 3,
        ("cuLaunchKernelEx", False): 2,
        ("cudaStreamSynchronize", False): 1,
        ("aten::mm", False): 7,
        ("sketch_project", True): 4,
        ("Memcpy DtoH (Device -> Pinned)", True): 1,
        ("Memset (Device)", True): 9,
    }
    assert _timing.count_events(events) == {
        "launches": 5,
        "kernels": 4,
        "host_waits": 1,
        "copies_to_host": 1,
    }


class FakeEvent:
    """A CUDA event of a device that works synchronously."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "FakeEvent") -> float:
        return 1e3 * (later.at - self.at)


def test_cuda_timer_with_fake_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(_timing, "FLUSH_BYTES", 1 << 20)
    timer = _timing.CudaTimer(CPU)
    timer.buffer.fill_(1)
    flushed = []

    def run() -> None:
        flushed.append(int(timer.buffer.max()) == 0)
        timer.buffer.fill_(1)
        time.sleep(0.01)

    seconds, host = timer.sample(run)
    # the first call measures the host, the second the device, after flushing the cache
    assert flushed == [False, True]
    assert 0.01 <= seconds < 0.1
    assert 0.01 <= host < 0.1


def test_labels_are_unique_and_shapes_cover_models() -> None:
    cases = all_cases()
    labels = [case.label for case in cases]
    assert len(set(labels)) == len(labels)
    shapes = {(c.shape["D"], c.shape["N"], c.shape["Q"]) for c in cases if c.op == "sketch"}
    expected = {(d, n, q) for d in (4096, 11008) for n in (2048, 8192) for q in (64, 128)}
    assert expected <= shapes
    ops = {"sketch", "gram", "convergence", "eigh", "fold_measure", "fold_rows", "nystrom"}
    assert {case.op for case in cases} == ops
    layers = next(c.shape["L"] for c in cases if c.op == "convergence")
    assert layers == 128


def test_competitors_and_flops_of_a_sketch_case() -> None:
    made = sketch._make(48, 64, 8, torch.bfloat16, "high", True, CPU)
    assert list(made.competitors)[1:] == ["torch", "peft step"]
    for run in made.competitors.values():
        run()
    # 4 N D Q flops, twice for bfloat16
    assert made.flops == 2 * 4 * 64 * 48 * 8


def test_wrong_sketch_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Any, basis: Any, pivot: Any, products: Any, *rest: Any, **options: Any) -> None:
        real(x, basis, pivot, products, *rest, **options)
        products[0, 0] *= 1.01

    real = sketch.sketch
    monkeypatch.setattr(sketch, "sketch", wrong)
    made = sketch._make(48, 64, 8, torch.float32, "high", False, CPU)
    with pytest.raises(ArithmeticError):
        _case.check(made)


@pytest.mark.parametrize("part", range(3))
def test_nan_in_any_sum_fails_the_check(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sketch.sketch

    def spoiled(x: Any, basis: Any, pivot: Any, *sums: torch.Tensor, **options: Any) -> None:
        right(x, basis, pivot, *sums, **options)
        sums[part].fill_(torch.nan)

    monkeypatch.setattr(sketch, "sketch", spoiled)
    row = _case.measure(sketch.cases(small=True)[0], CPU)
    assert row["status"] == "incorrect"
    assert "relative error of nan" in row["reason"]


def test_wrong_fold_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fold.measure(CPU, small=True)["status"] == "timed"
    monkeypatch.setattr(fold, "lost_variance", lambda stream, x: 0.5)
    row = fold.measure(CPU, small=True)
    assert row["status"] == "incorrect"
    assert "wall_ms" not in row
    last = fold.SMALL_WIDTHS[-1][0]
    monkeypatch.setattr(fold, "lost_variance", lambda s, x: torch.nan if s.features == last else 0)
    assert fold.measure(CPU, small=True)["reason"] == "lost variance nan"


def test_end_to_end_measurement_order_and_ratios() -> None:
    plan = end_to_end.measurement_order(end_to_end.SETTINGS["llama-2-7b"])
    assert plan[:3] == [(4, "plain"), (4, "ours"), (4, "peft")]
    assert plan[-1] == (16, "peft")
    assert sorted(plan) == sorted((n, m) for n in (4, 8, 16) for m in end_to_end.METHODS)
    plan = end_to_end.measurement_order(end_to_end.SETTINGS["llama-3.1-8b"])
    assert plan == [(n, name) for n in (4, 8, 16) for name in ("plain", "ours")]
    rows = [
        {"batch": 4, "method": name, "status": "measured", "step_s": {"median": seconds}}
        for name, seconds in (("plain", 1.0), ("ours", 1.04), ("peft", 10.4))
    ]
    rows.append({"batch": 8, "method": "plain", "status": "failed"})
    first, second = end_to_end.ratios(rows)
    assert first == {
        "batch": 4,
        "ours_over_plain": pytest.approx(1.04),
        "peft_over_ours": pytest.approx(10.0),
    }
    assert second == {"batch": 8}


def test_calls_per_step_are_a_difference_of_two_runs() -> None:
    few, many = {"launches": 30, "kernels": None}, {"launches": 70, "kernels": None}
    assert end_to_end.per_step(few, many, 4) == {"launches": 10.0, "kernels": None}


def test_token_ids_are_mapped_into_the_vocabulary() -> None:
    ids = end_to_end.load_ids(100, 500)
    assert ids.shape == (500,)
    assert int(ids.min()) >= 0
    assert int(ids.max()) < 100
    assert ids.unique().numel() > 20


def test_failing_method_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: end_to_end.Bench) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(end_to_end.METHODS, "ours", fail)
    quick = replace(end_to_end.SETTINGS["tiny"], methods=("plain", "ours"))
    monkeypatch.setitem(end_to_end.SETTINGS, "tiny", quick)
    found = end_to_end.run("tiny", CPU)
    assert [row["status"] for row in found["rows"]] == ["measured", "failed"]
    assert found["rows"][1]["reason"] == "RuntimeError: out of memory"


@pytest.mark.parametrize("chip", ["sm_90", "sm_100"])  # sm_100 launches kernels early
def test_tuning_varies_one_parameter_without_changing_the_table(chip: str) -> None:
    sketch_plan = pytest.importorskip("eva_kernels.kernels.sketch_plan")
    launch = pytest.importorskip("eva_kernels.kernels.launch")
    table, arch = sketch_plan.SKETCH_TILES, launch.ARCHS[chip]
    tiles = dict(table)
    changes = list(tune.candidate_changes(arch, 64, tiles))
    for change in changes:
        before, after = arch, change.arch
        if change.arch.name == arch.name:
            assert replace(after, dependent_launch=True) == before
            continue
        old, new = table[chip][64], tiles[after.name][64]
        assert sum(getattr(old, f) != getattr(new, f) for f in ("project", "back")) == 1
        assert replace(after, name=chip) == before
    assert len({change.label for change in changes}) == len(changes) > 10
    assert sketch_plan.SKETCH_TILES is table


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, kernels take no CPU tensors")
def test_tuning_reports_failed_and_incorrect_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("eva_kernels.kernels.launch")
    problem, arch = tune.Problem(64, 96, 16, CPU), launch.ARCHS["sm_90"]
    change = tune.Change("as is", arch)
    timer = _timing.CpuTimer()
    timed = tune.measure(lambda: problem, change, arch, timer, 0.01)
    assert timed["status"] == "timed"
    assert timed["kernels_us"] == {}  # only on a GPU
    other_chip = tune.Change("another", replace(arch, name="another"))
    failed = tune.measure(lambda: problem, other_chip, arch, timer, 0.01)
    assert failed["status"] == "failed"
    assert "another" in failed["reason"]
    none = tune.measure(lambda: tune.Problem(0, 0, 0, CPU), change, arch, timer, 0.01)
    assert none["status"] == "failed"
    right = problem.truth
    problem.truth = (1.001 * right[0], *right[1:])
    row = tune.measure(lambda: problem, change, arch, timer, 0.01)
    assert row["status"] == "incorrect"
    assert "relative error 1" in row["reason"]
    problem.truth = right
    drift = iter((0.0, 1e-6))

    def other(arch: Any, sums: tune.Sums) -> tune.Sums:
        products = right[0].float() * (1 + next(drift))
        return products, *right[1:]

    monkeypatch.setattr(problem, "run", other)
    assert problem.failure_reason(arch) == "two runs differ in their bits"


def test_tuning_has_a_row_for_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("eva_kernels.kernels.launch")
    monkeypatch.setattr(tune, "Problem", pytest.fail)  # must not be created after the deadline
    saved: list[int] = []
    rows = tune.run(CPU, small=True, seconds=0.0, save=lambda rows: saved.append(len(rows)))
    assert {row["status"] for row in rows} == {"not reached"}
    assert saved == list(range(1, len(rows) + 1))
    assert rows[0]["change"] == "as is"
    assert "not reached" in tune.table(rows)
    arch = launch.ARCHS["sm_90"]
    assert len(rows) == 1 + len(list(tune.candidate_changes(arch, 64, dict(launch.SKETCH_TILES))))


def test_trace_is_written(tmp_path: Path) -> None:
    setting = replace(end_to_end.SETTINGS["tiny"], steps=2)
    bench = end_to_end.Bench(setting, end_to_end.build_model(setting, CPU), 1, CPU)
    path = tmp_path / "new" / "trace.json"
    end_to_end.write_trace(bench, path, steps=2)
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::embedding" for event in events) == 2


def test_failing_trace_keeps_the_measurements(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(end_to_end.SETTINGS, "tiny", replace(end_to_end.SETTINGS["tiny"], steps=2))
    monkeypatch.setattr(end_to_end, "METHODS", {"plain": end_to_end.measure_plain})
    (tmp_path / "file").touch()
    found = end_to_end.run("tiny", CPU, trace=tmp_path / "file" / "trace.json")
    assert found["rows"][0]["status"] == "measured"
    assert "file" in found["trace"]

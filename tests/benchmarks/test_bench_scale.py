"""The benchmark part ``scale``: fits, roofline, checks before timing, text, resuming."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.scale import fit, measure, memory, run, show, words, work
from bench.scale.data import make_tokens
from bench.scale.work import Ceilings, Point
from bench.sections import markdown

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e11, 5e10)
SMALL = Point(D=48, N=64, L=2, K=4)


pytestmark = pytest.mark.usefixtures("single_thread")


def test_slope_is_the_exponent() -> None:
    xs = [1.0, 2.0, 4.0, 8.0]
    assert fit.slope(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert fit.slope([2.0], [1.0]) is None


XS = [100.0, 200.0, 400.0, 800.0]


@pytest.mark.parametrize(
    ("left", "kind", "at", "text"),
    [
        ([1, 1, 1, 1], "always", None, "everywhere in D = 100 to 800"),
        ([9, 9, 9, 9], "never", None, "nowhere in D = 100 to 800"),
        ([16, 8, 2, 1], "from", 282.8, "from D = 280 on"),
        ([1, 2, 8, 16], "until", 282.8, "up to D = 280"),
        ([1, 8, 8, 2], "from", 565.7, "from D = 570 on (the last of several changes"),
    ],
)
def test_crossing_kind_place_and_text(
    left: list[float], kind: str, at: float | None, text: str
) -> None:
    found = fit.crossing(XS, left, [4.0] * 4)
    assert found.kind == kind
    assert found.at == (None if at is None else pytest.approx(at, abs=0.1))
    assert found.text("D").startswith(text)
    assert found.single == ("several" not in text)


def test_crossing_with_too_few_points_is_unknown() -> None:
    assert fit.crossing([], [], []).kind == "unknown"
    assert "too few" in fit.crossing([5.0], [1.0], [2.0]).text("N")


def test_points_vary_one_size_at_a_time() -> None:
    base = Point(8, 16, 2, 4)
    found = work.points(base, {"D": (4, 8, 32), "L": (1, 2)})
    assert found[0] == base
    assert len(found) == len(set(found)) == 4
    rows = [asdict(point) for point in found]
    assert [row["D"] for row in work.rows_along("D", base, rows)] == [4, 8, 32]
    assert [row["L"] for row in work.rows_along("L", base, rows)] == [1, 2]
    assert work.rows_along("N", base, rows) == [asdict(base)]


def test_floor_counts_flops_and_bytes() -> None:
    point = Point(D=100, N=1000, L=3, K=4)  # Q = 8
    found = work.floors(point, CPU, torch.float32, Ceilings(1e9, 1e9, 1e9))
    terms = found["terms_ms"]
    assert terms["accumulate, arithmetic"] == pytest.approx(3 * 4 * 1000 * 100 * 8 / 1e6)
    assert terms["accumulate, memory"] == pytest.approx(3 * (400_000 + 12 * 800) / 1e6)
    assert terms["fold, arithmetic"] == pytest.approx(3 * 6 * 100 * 64 / 1e6)
    assert terms["fold, memory"] == pytest.approx(3 * (16 * 800 + 16 * 400) / 1e6)
    assert found["limited_by"] == "accumulate, arithmetic"
    assert found["step_ms"] == pytest.approx(found["accumulate_ms"] + found["fold_ms"])
    slow = work.floors(point, CPU, torch.float32, Ceilings(1e6, 1e9, 1e9))
    assert slow["limited_by"] == "accumulate, memory"
    assert work.floors(point, CPU, torch.float32, Ceilings(1e9, 1e9, 1e5))["limited_by"] == (
        "fold, arithmetic"
    )


@pytest.mark.parametrize(("dtype", "parts"), [(torch.float32, 3), (torch.bfloat16, 2)])
def test_floor_of_a_gpu_counts_the_bfloat16_products(dtype: torch.dtype, parts: int) -> None:
    on_gpu, on_cpu = (
        work.floors(SMALL, torch.device(name), dtype, CEILINGS)["terms_ms"]
        for name in ("cuda", "cpu")
    )
    key = "accumulate, arithmetic"
    assert on_gpu.pop(key) == pytest.approx(parts * on_cpu.pop(key))
    assert on_gpu == on_cpu


def test_lost_variance_equals_a_full_svd() -> None:
    tokens = make_tokens(SMALL, CPU, torch.float32, 0)
    wide = tokens.x.double() - tokens.x.double().mean(0)
    _, squares, rows = torch.linalg.svd(wide, full_matrices=False)
    assert abs(tokens.lost(rows[:4])) < 1e-6
    rows = torch.linalg.qr(torch.randn(48, 4)).Q.mT
    captured = (wide @ rows.double().mT).square().sum() / squares[:4].square().sum()
    assert tokens.lost(rows) == pytest.approx(float(1 - captured), abs=1e-4)


def test_one_point_is_checked_and_timed() -> None:
    row = measure.measure(SMALL, CPU, torch.float32, CEILINGS, 0.2)
    assert set(row["ms"]) == {"sketch", "gram", "peft", "forward"}
    assert set(row["ms"]["sketch"]) == {"accumulate", "fold", "compare", "step"}
    assert row["width"] == 8
    assert row["left_out"] == {}
    assert max(row["lost"].values()) < 1e-4
    step = row["ms"]["sketch"]
    assert step["step"]["median"] >= step["accumulate"]["median"] > 0


def test_methods_that_take_too_long_are_left_out() -> None:
    slow = Ceilings(1e10, 1e3, 1e3)
    row = measure.measure(SMALL, CPU, torch.float32, slow, 0.05)
    assert {"gram", "forward"} <= set(row["left_out"])
    assert set(row["ms"]) == {"sketch", "peft"} - set(row["left_out"])


def test_nan_in_any_layer_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    two_layers = replace(SMALL, L=2)
    tokens = [make_tokens(two_layers, CPU, torch.float32, seed) for seed in range(2)]
    ours = measure.Ours(two_layers, CPU, tokens, "sketch")
    assert measure.check("sketch", ours) < 1e-4
    rows = ours.components()
    rows[1] = torch.full_like(rows[1], torch.nan)
    monkeypatch.setattr(ours, "components", lambda: rows)
    with pytest.raises(ArithmeticError, match="lost nan"):
        measure.check("sketch", ours)


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real, steps = measure.InputStream.add, []

    def add_half_of_the_features(self: Any, x: torch.Tensor) -> int:
        steps.append(1)
        return real(self, torch.where(torch.arange(x.shape[1]) < 24, x, 0.0))

    monkeypatch.setattr(measure.InputStream, "add", add_half_of_the_features)
    with pytest.raises(ArithmeticError, match="sketch is wrong"):
        measure.measure(SMALL, CPU, torch.float32, CEILINGS, 0.2)
    assert len(steps) == measure.CHECK_STEPS * SMALL.L


def test_step_without_a_fold_raises() -> None:
    few = Point(D=48, N=4, L=1, K=4)  # fewer tokens than the sketch has rows
    with pytest.raises(ArithmeticError, match="0 of 1"):
        measure.measure(few, CPU, torch.float32, CEILINGS, 0.2)


BASE = Point(D=1024, N=1024, L=4, K=32)


def made_up(point: Point, sketch: float, gram: float, peft: float, end: float) -> dict[str, Any]:
    def spread(ms: float) -> dict[str, float]:
        return {"median": ms, "p20": ms, "p80": ms}

    phases = {"accumulate": sketch - end, "fold": end, "compare": 0.0, "step": sketch}
    others = {"gram": gram, "peft": peft, "forward": 5 * sketch * point.N / 1024}
    return {
        **asdict(point),
        "floor": work.floors(point, CPU, torch.float32, CEILINGS),
        "state_bytes": {m: point.state_bytes(m) for m in ("sketch", "gram")},
        "left_out": {},
        "ms": {
            "sketch": {name: spread(ms) for name, ms in phases.items()},
            **{name: {"step": spread(ms)} for name, ms in others.items()},
        },
    }


def rows_of(make: Callable[[Point], dict[str, Any]]) -> list[dict[str, Any]]:
    axes = {"D": (256, 512, 2048), "N": (256, 4096), "L": (1, 16), "K": (8, 128)}
    return [make(point) for point in work.points(BASE, axes)]


def cubic(point: Point) -> dict[str, Any]:
    """Return a row where gram wins below D = 600, the fold is cheap from N = 1000, PEFT loses."""
    step = point.D * point.L * point.K / 1000
    gram = step * point.D / 600
    return made_up(point, step, gram, 10 * step, step * 100 / point.N)


def test_text_of_crossovers() -> None:
    lines = words.crossovers(BASE, rows_of(cubic))
    text = "\n".join(lines)
    assert "faster than exact Gram from D = 600 on; everywhere in N = 256 to 4096" in text
    assert "faster than PEFT's step everywhere in D = 256 to 2048" in text
    assert "PEFT's step takes 10 to 10 times as long" in text
    assert "below 10 % of the step from N = 1000 on: 39 % at N = 256, 2 % at N = 4096." in text
    assert "nowhere in D = 256 to 2048; from N = 2000 on" in text
    assert "more memory than that of the sketch at every width, and more than ten times" in text
    assert "no more than 10 % apart" in text


def test_share_above_one_is_explained() -> None:
    rows = rows_of(cubic)
    assert "More than 100 %" not in words._roofline_text(BASE, rows)[0]
    for row in rows:
        row["floor"]["step_ms"] = 2 * row["ms"]["sketch"]["step"]["median"]
    assert "to 200 % (" in words._roofline_text(BASE, rows)[0]
    assert "More than 100 %" in words._roofline_text(BASE, rows)[0]


def test_text_without_a_crossover_states_the_loss() -> None:
    def slow(point: Point) -> dict[str, Any]:
        return made_up(point, 10.0, 1.0, 2.0, 9.0)

    text = "\n".join(words.crossovers(BASE, rows_of(slow)))
    assert "faster than exact Gram nowhere in D = 256 to 2048" in text
    assert "Exact Gram takes 0.1 to 0.1 times as long" in text
    assert "faster than PEFT's step nowhere in D = 256 to 2048" in text
    assert "below 10 % of the step nowhere in N = 256 to 4096" in text


def test_first_width_where_the_gram_state_is_larger() -> None:
    def larger(point: Point) -> bool:
        return point.state_bytes("gram") > 10 * point.state_bytes("sketch")

    found = words.first_width(BASE, larger)
    assert larger(Point(found, 1, 1, 32))
    assert not larger(Point(found - 1, 1, 1, 32))


def record_of(rows: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    machine = dict.fromkeys(("cpu", "gpu", "threads", "torch", "transformers", "peft"), "x")
    return {
        "date": "2026-01-01",
        "commit": "abc",
        "machine": machine,
        "settings": {"base": asdict(BASE), "dtype": "float32", "device": "cpu"},
        "rows": {"ceilings": asdict(CEILINGS), "points": rows, "memory": memory.simulated(out)},
    }


def test_sections_of_a_record(tmp_path: Path) -> None:
    rows = rows_of(cubic)
    del rows[1]["ms"]["peft"], rows[1]["ms"]["forward"]
    failed = {**asdict(Point(1, 2, 3, 4)), "error": "RuntimeError: no memory"}
    record = json.loads(json.dumps(record_of([*rows, failed], tmp_path)))
    found = show.sections(record)
    titles = ["Cost of a step", "Slopes", "Where the order changes"]
    assert [section.title for section in found][:3] == titles
    assert "no memory" in found[0].notes
    assert found[0].rows[0].count("—") == 3  # D = 256: PEFT, forward, and its share of forward
    slopes = {row[0]: row[3] for row in found[1].rows}
    assert slopes["width D"] == "1.00 (1.00)"
    assert slopes["tokens N a step"] == "0.00 (0.00)"
    forward = {row[0]: row[-1] for row in found[1].rows}
    assert forward["tokens N a step"].startswith("1.00")
    assert "216 times" in found[3].text
    for section in found:
        assert markdown(section, record)
        for name, draw in section.figures.items():
            figure = draw()
            assert tuple(figure.get_size_inches()) == (7, 4.5)
            assert figure.get_label()
            assert all(ax.get_ylabel() for ax in figure.axes[::2])
            figure.savefig(tmp_path / f"{name}.png")
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_text_without_measurements(tmp_path: Path) -> None:
    failed = {**asdict(BASE), "error": "RuntimeError: no memory"}
    record = record_of([failed], tmp_path)
    record["rows"]["memory"] = None
    (only,) = show.sections(record)
    assert only.text == "Nothing was measured."
    assert "no memory" in only.notes


def test_simulated_memory_is_read_from_the_results_folder_first(tmp_path: Path) -> None:
    there = memory.simulated(tmp_path)
    assert there is not None
    llama = next(model for model in there["models"] if model["model"] == "Llama-2-7B")
    assert llama["gram_state"] / 1e9 == pytest.approx(22.1, abs=0.1)
    record = json.loads((memory.RESULTS / memory.FILE).read_text())
    record["rows"] = [r for r in record["rows"] if r["model"] == "Llama-2-7B"]
    record["rows"][0]["planned_state_bytes"] += 1  # no longer the widths of the config
    (tmp_path / memory.FILE).write_text(json.dumps({**record, "commit": "mine"}))
    here = memory.simulated(tmp_path)
    assert here is not None
    assert here["commit"] == "mine"
    assert [model["gram_state"] for model in here["models"]] == [None]


def test_interrupted_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = run.Preset(SMALL, {"D": (32, 48), "L": (1,)}, 0.05)
    for presets in (run.PRESETS, run.CUDA_PRESETS):
        monkeypatch.setitem(presets, "tiny", preset)
    monkeypatch.setattr(run, "machine_ceilings", lambda device: CEILINGS)
    measured: list[Point] = []

    def watched(point: Point, *rest: Any) -> dict[str, Any]:
        if len(measured) == 2:
            measured.append(point)
            raise KeyboardInterrupt
        measured.append(point)
        return measure.measure(point, *rest)

    monkeypatch.setattr(run, "measure", watched)
    with pytest.raises(KeyboardInterrupt):
        run.run("tiny", tmp_path, quiet=True)
    record = json.loads(run.run("tiny", tmp_path, quiet=True).read_text())
    third = Point(D=48, N=64, L=1, K=4)
    assert measured == [SMALL, Point(D=32, N=64, L=2, K=4), third, third]
    assert record["rows"]["ceilings"] == asdict(CEILINGS)
    assert not any("error" in row for row in record["rows"]["points"])
    for section in show.sections(record):
        assert markdown(section, record)


def test_unknown_preset_raises() -> None:
    with pytest.raises(ValueError, match="quick, full"):
        run.run("slow")

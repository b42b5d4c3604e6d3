"""The benchmark part ``accuracy``: results on known data, resuming, tables and text."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.accuracy import inputs, methods, run, show
from bench.accuracy.exact import ExactPCA, rank_errors
from bench.accuracy.methods import METHODS, Answer, Method
from bench.sections import markdown

K = 8  # more than the number of outlier features


class FixedAxes:
    """Always returns the first coordinate axes."""

    def __init__(self, features: int, components: int) -> None:
        self.features, self.components = features, components

    def step(self, x: Tensor) -> None:
        pass

    def answer(self) -> Answer:
        ratios = torch.full((self.components,), 1 / self.features, dtype=torch.float64)
        return Answer(torch.eye(self.features)[: self.components], ratios)


FIXED_AXES = Method("blind", FixedAxes)


pytestmark = pytest.mark.usefixtures("single_thread")


def tokens(steps: int = 4) -> list[Tensor]:
    return list(inputs.outlier_stream(48, 64, steps))


def test_gram_loses_no_variance_and_fixed_axes_most() -> None:
    chosen = {name: METHODS[name] for name in ("gram", "sketch-2", "peft", "scikit")}
    found = run.measure(tokens(), {**chosen, "blind": FIXED_AXES}, K, (2, 4))
    last = {name: method["points"][-1] for name, method in found["methods"].items()}
    assert abs(last["gram"]["lost"]) < 1e-9
    assert abs(last["gram"]["ratio_error"]) < 1e-5
    assert last["blind"]["lost"] > 0.5
    for name in ("sketch-2", "peft", "scikit"):
        assert 1e-9 < last[name]["lost"] < 0.05
        assert -0.3 < last[name]["ratio_error"] < 0
    assert (found["features"], found["tokens"], found["steps"]) == (48, 64, 4)
    assert [point["tokens"] for point in found["exact"]] == [128, 256]


def test_exact_pca_and_lost_variance_equal_a_full_svd() -> None:
    parts = tokens()
    exact = ExactPCA(48)
    for part in parts:
        exact.add(part)
    truth = exact.solve(K)
    wide = torch.cat(parts).double()
    squares = torch.linalg.svdvals(wide - wide.mean(0)).square()
    torch.testing.assert_close(truth.ratios, squares[:K] / squares.sum(), rtol=1e-9, atol=0)
    lost = run.compare(Answer(torch.eye(48)[:K], truth.ratios), truth)["lost"]
    captured = (wide - wide.mean(0))[:, :K].square().sum()
    assert lost == pytest.approx(float(1 - captured / squares[:K].sum()), rel=1e-9)


def test_all_methods_pass_the_check_on_planted_data() -> None:
    assert methods.check_all(METHODS) == {}


class Biased(FixedAxes):
    """Finds the components, but returns wrong ratios."""

    factor = 1.01

    def __init__(self, features: int, components: int) -> None:
        self.right = METHODS["gram"].start(features, components)

    def step(self, x: Tensor) -> None:
        self.right.step(x)

    def answer(self) -> Answer:
        found = self.right.answer()
        return replace(found, ratios=self.factor * found.ratios)


class Undefined(Biased):
    factor = float("nan")


def test_wrong_methods_fail_the_check() -> None:
    wrong = {"biased": Biased, "undefined": Undefined}
    faults = methods.check_all({"blind": FIXED_AXES, **{n: Method(n, c) for n, c in wrong.items()}})
    assert set(faults) == {"blind", "biased", "undefined"}
    assert "blind loses" in faults["blind"]
    assert "off by nan" in faults["undefined"]


def test_order_of_methods_is_shuffled_per_step() -> None:
    names = list(METHODS)
    orders = [run._shuffled(names, step) for step in range(1, 47)]
    assert orders == [run._shuffled(names, step) for step in range(1, 47)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert {order[0] for order in orders} == set(names)
    after = [order[order.index("scikit") + 1] for order in orders if order[-1] != "scikit"]
    assert max(after.count(name) for name in names) < len(orders) / 3


def layer(exact: list[float], found: list[float]) -> dict[str, Any]:
    place = {"step": 1, "tokens": 10}
    return {
        "exact": [{**place, "ratios": exact}],
        "methods": {"m": {"points": [{**place, "ratios": found}]}, "refused": {}},
    }


def test_rank_errors() -> None:
    right = layer([0.5, 0.2], [0.5, 0.2])
    wrong = layer([0.4, 0.3], [0.4, 0.1])  # its second component ranks below the other layer's
    assert rank_errors([right, right], 1)[0]["rank_error"] == 0
    found = rank_errors([right, layer([0.4, 0.3], [0.4, 0.35])], 1)
    assert found == [{"method": "m", "step": 1, "tokens": 10, "rank_error": 0}]
    three = [right, wrong, layer([0.01, 0.0], [0.01, 0.0])]
    assert rank_errors(three, 1)[0]["rank_error"] == 2
    assert rank_errors([], 1) == []


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Install a preset of two streams without a model; return the list of those that were run."""
    asked: list[str] = []

    def steps(self: inputs.Inputs, label: str) -> tuple[int, Iterator[Tensor]]:
        asked.append(label)
        return 3, inputs.outlier_stream(48, 64, 3, seed=len(label))

    monkeypatch.setattr(inputs.Inputs, "steps", steps)
    preset = run.Preset(inputs.Sizes(["layer 0 query"], 3, 48, 64, 3), (1, 3), (3,))
    monkeypatch.setitem(run.PRESETS, "tiny", preset)
    return asked


def test_interrupted_run_resumes(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.measure

    def stop(*args: Any) -> dict[str, Any]:
        if len(tiny) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(run, "COMPONENTS", K)
    monkeypatch.setattr(run, "RANK", 2)
    monkeypatch.setattr(run, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run.run("tiny", tmp_path, quiet=True)
    assert not (tmp_path / "accuracy.json").exists()
    monkeypatch.setattr(run, "measure", real)
    path = run.run("tiny", tmp_path, quiet=True)
    assert tiny == ["layer 0 query", inputs.SYNTHETIC, inputs.SYNTHETIC]
    record = json.loads(path.read_text())
    assert [row["synthetic"] for row in record["rows"]["inputs"]] == [False, True]
    assert {e["method"] for e in record["rows"]["ranks"]} == set(METHODS)
    assert '"ratios"' not in path.read_text()
    for section in show.sections(record):
        assert markdown(section, record)


def test_unknown_preset_raises() -> None:
    with pytest.raises(ValueError, match="quick, full"):
        run.run("slow")


def made_up(numbers: dict[str, tuple[float, float]], name: str, d: int) -> dict[str, Any]:
    """Return a row with these milliseconds and losses by method, at two checkpoints."""
    places = [{"step": 1, "tokens": 100}, {"step": 2, "tokens": 200}]
    return {
        "input": name,
        "synthetic": name.startswith("synthetic"),
        "features": d,
        "tokens": 100,
        "steps": 2,
        "exact": [{**place, "ratios": [0.5]} for place in places],
        "methods": {
            key: {
                "ms": {"median": ms, "p20": ms, "p80": ms},
                "answer_ms": 7.0,
                "points": [
                    {**place, "lost": value, "ratio_error": -0.1, "ratios": [0.5]}
                    for place, value in zip(places, losses, strict=True)
                ],
            }
            for key, (ms, lost) in numbers.items()
            for losses in [(lost / 10 if key == "peft" else lost, lost)]
        },
    }


def record_of(*rows: dict[str, Any]) -> dict[str, Any]:
    settings = {"components": 32, "rank": 16, "labels": {n: m.label for n, m in METHODS.items()}}
    ranks = [
        {"method": name, "step": step, "tokens": 100 * step, "rank_error": step}
        for name in ("peft", "sketch-2")
        for step in (1, 2)
    ]
    machine = dict.fromkeys(("cpu", "gpu", "threads", "torch", "transformers", "peft"), "x")
    return {
        "date": "2026-01-01",
        "commit": "abc",
        "machine": machine,
        "settings": settings,
        "rows": {"inputs": list(rows), "ranks": ranks, "refused": {"scikit": "it is wrong"}},
    }


GOOD = {
    "peft": (40.0, 4e-3),
    "peft-2k": (80.0, 1e-4),
    "gram": (8.0, 1e-15),
    "sketch-1": (2.0, 8e-3),
    "sketch-2": (4.0, 1e-3),
}


def test_text_states_wins_and_losses() -> None:
    broken = {"input": "layer 9", "error": "RuntimeError: no memory"}
    record = record_of(made_up(GOOD, "layer 0", 384), made_up(GOOD, "layer 1", 384), broken)
    first, second = show.sections(record)
    assert "10 times faster than PEFT's EVA and 4 times closer" in first.text
    assert "Further off than PEFT's EVA: sketch Q = 1 K (2.0 times)" in first.text
    assert "is 10 times closer than it and 20 times slower" in first.text
    assert "Exact Gram is 2 times slower than the sketch" in first.text
    assert "sketch Q = 1 K; sketch Q = 2 K; exact Gram." in first.text
    assert "RuntimeError: no memory" in first.notes
    assert "it is wrong" in first.notes
    assert [row[0] for row in first.rows] == [METHODS[name].label for name in GOOD]
    assert first.rows[2][2] == "exact"
    assert "closer up to 100 tokens, and further off from 200 on" in second.text
    assert "nearer to the exact ones than those of PEFT's EVA at 0 of 2" in second.text
    assert second.rows[0][1:] == ["4.0e-04 / 1", "4.0e-03 / 2"]


def test_text_changes_with_the_numbers() -> None:
    slow = {**GOOD, "sketch-2": (80.0, 8e-3), "peft-2k": (40.0, 9e-3), "gram": (4.0, 1e-15)}
    first, second = show.sections(record_of(made_up(slow, "layer 0", 384)))
    assert "2 times slower than PEFT's EVA and 2 times further off" in first.text
    assert "1.12 times further off than it and 2 times faster" in first.text
    assert "Exact Gram is 20 times faster" in first.text
    assert "sketch Q = 1 K; exact Gram." in first.text
    assert "PEFT's EVA is closer after 100, 200 tokens" in second.text


def test_text_without_measurements() -> None:
    broken = {"input": "layer 9", "error": "RuntimeError: no memory"}
    (only,) = show.sections(record_of(broken))
    assert only.text == "Nothing was measured."
    assert "no memory" in only.notes


def test_figures_have_axes(tmp_path: Path) -> None:
    rows = [made_up(GOOD, f"layer {i}", 384) for i in range(7)]
    record = record_of(*rows, made_up(GOOD, "synthetic, outliers", 2048))
    drawn = {k: draw() for s in show.sections(record) for k, draw in s.figures.items()}
    assert list(drawn) == ["accuracy_time", "accuracy_tokens", "accuracy_ranks"]
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert figure.get_label()
        assert tuple(figure.get_size_inches()) == (7, 4.5)
    time, over = drawn["accuracy_time"], drawn["accuracy_tokens"]
    assert len(time.axes) == 6
    assert time.axes[-1].get_title() == "synthetic, outliers (D = 2048)"
    assert all(axes.get_xlabel() for axes in [*time.axes[3:], *over.axes])
    labels = [text.get_text() for text in time.axes[0].get_yticklabels()]
    assert "exact" in labels

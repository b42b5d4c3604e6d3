"""``calibrate``: exact directions and ranks, convergence, options, logging, reproducibility."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import eva_kernels
from eva_kernels.streaming import InputStream, Options
from eva_peft.calibrate import CalibrationPass
from eva_peft.passes import ranks
from integration.conftest import (
    Clash,
    angle,
    exact_pca,
    layer_inputs,
    lora,
    lost,
    make_mlp,
    run,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)


def test_components_equal_the_exact_pca(
    llama: nn.Module, texts: list[Any], llama_result: Any
) -> None:
    names = list(llama_result.ranks)
    inputs = layer_inputs(llama, texts, names)
    state = llama_result.state_dict()
    compared = 0
    for name in names:
        rank, rows = llama_result.ranks[name], state[name]
        assert rows.shape == (rank, llama_result.in_features[name])
        if rank == 0:
            continue
        variances, exact = exact_pca(inputs[name])
        assert lost(rows, inputs[name]) < 1e-9
        if variances[rank] < 0.95 * variances[rank - 1]:
            assert angle(rows, exact[:rank]) < 1e-4
            compared += 1
        ratio = variances / variances.sum()
        found = llama_result.explained_variance_ratio[name].double()
        torch.testing.assert_close(found, ratio[: len(found)], rtol=1e-4, atol=1e-8)
        values = llama_result.singular_values[name].double()
        torch.testing.assert_close(values, variances.sqrt()[: len(values)], rtol=1e-4, atol=1e-5)
    assert compared >= 7
    kept = sum(int(b["attention_mask"].sum()) for b in texts)
    assert llama_result.tokens == kept
    assert llama_result.forwards == len(texts)


def test_ranks_follow_the_exact_ratios(
    llama: nn.Module, texts: list[Any], llama_result: Any
) -> None:
    inputs = layer_inputs(llama, texts, list(llama_result.ranks))
    pool = []
    for name in llama_result.ranks:
        variances = exact_pca(inputs[name])[0]
        pool += [(float(v / variances.sum()), name) for v in variances[:8]]
    pool.sort(key=lambda entry: -entry[0])
    expected = dict.fromkeys(llama_result.ranks, 0)
    for _, name in pool[: 14 * 4]:
        expected[name] += 1
    # layers that share an input have equal ratios, so either may get the last rank
    difference = sum(abs(expected[n] - r) for n, r in llama_result.ranks.items())
    assert difference <= 2
    assert max(llama_result.ranks.values()) <= 8


def test_sketch_is_close_to_exact(llama: nn.Module, texts: list[Any], llama_result: Any) -> None:
    result = run(llama, iter(texts), lora(tau=1.0), method="sketch")
    inputs = layer_inputs(llama, texts, list(result.ranks))
    assert set(result.method.values()) == {"sketch"}
    losses = [lost(rows, inputs[n]) for n, rows in result.state_dict().items() if len(rows)]
    assert max(losses) < 0.02
    difference = sum(abs(result.ranks[n] - r) for n, r in llama_result.ranks.items())
    assert difference <= 0.2 * 56


def test_calibrate_changes_no_weight(llama: nn.Module, texts: list[Any]) -> None:
    model = wrapped(llama, lora())
    before, config = state_of(model), copy.deepcopy(model.peft_config["default"])
    result = run(model, texts, max_steps=3)
    assert same_state(before, state_of(model))
    assert model.peft_config["default"] == config
    assert not hasattr(model, "eva_result")
    done = result.apply(model)
    assert done is model
    assert not same_state(before, state_of(model))


def test_equal_seeds_give_bitwise_equal_results(llama: nn.Module, texts: list[Any]) -> None:
    torch.manual_seed(1)
    first = run(llama, texts, lora(), max_steps=6, method="sketch")
    torch.manual_seed(2)
    second = run(llama, texts, lora(), max_steps=6, method="sketch")
    assert first.ranks == second.ranks
    for name, rows in first.components.items():
        assert torch.equal(rows, second.components[name])
        assert torch.equal(first.singular_values[name], second.singular_values[name])
    other = run(llama, texts, lora(), max_steps=6, method="sketch", seed=5)
    assert any(not torch.equal(r, other.components[n]) for n, r in first.components.items())


def test_pass_stops_when_all_layers_have_converged(llama: nn.Module, texts: list[Any]) -> None:
    reports: list[dict[str, Any]] = []
    result = eva_kernels.calibrate(
        llama, texts, lora(tau=0.95), method="gram", progress=False, callback=reports.append
    )
    assert all(result.converged.values())
    assert len(reports) == result.steps == len(result.history["step"])
    assert reports[-1]["converged"] == reports[-1]["layers"] == 14
    assert reports[-1]["tokens"] == result.tokens
    assert {len(v) for v in result.history.values()} == {result.steps}
    assert result.history["similarity"][0] == [None] * 14
    assert set(result.history) == {
        *("step", "forwards", "tokens", "seconds", "converged", "similarity")
    }
    assert set(result.seconds) == {"forward", "accumulate", "fold", "check", "total"}
    assert all(value >= 0 for value in result.seconds.values())


def test_seconds_separate_hooks_from_the_forward_pass() -> None:
    def slow(x: Any, model_input: Any, name: str) -> torch.Tensor:
        time.sleep(0.05)
        return x[0]

    options = {"max_steps": 4, "prepare_layer_inputs_fn": slow}
    seconds = run(make_mlp(), vectors(4), lora(target_modules=["0"]), **options).seconds
    total = seconds.pop("total")
    assert seconds["accumulate"] >= 4 * 0.05
    assert sum(seconds.values()) <= total


def test_callback_gets_the_names_of_layers(llama: nn.Module, texts: list[Any]) -> None:
    reports: list[dict[str, Any]] = []
    config = lora(tau=1.0)
    result = run(llama, texts, config, method="gram", max_steps=3, callback=reports.append)
    assert reports[0]["names"] == list(result.ranks)
    assert all(numbers["names"] is reports[0]["names"] for numbers in reports)
    assert reports[0]["slowest"] is None
    for numbers in reports[1:]:
        assert numbers["slowest"] in numbers["names"]
        place = numbers["names"].index(numbers["slowest"])
        assert numbers["similarity"][place] == min(numbers["similarity"])


def test_log_has_begin_steps_and_end(
    llama: nn.Module, texts: list[Any], caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    def logged(level: int) -> list[tuple[int, str]]:
        caplog.clear()
        with caplog.at_level(level, "eva_kernels"):
            result = run(llama, texts, lora(tau=1.0), method="gram", max_steps=3)
        assert result.steps == 3
        found = [r for r in caplog.records if r.name == "eva_kernels" and "pass" in r.message]
        return [(record.levelno, record.message) for record in found]

    planned = eva_kernels.estimate(llama, lora(), method="gram").state_bytes
    begin, end = logged(logging.INFO)
    assert begin == (
        logging.INFO,
        "calibration pass begins on cpu: 14 layers (14 exact, 0 sketched), at most "
        f"{planned} bytes of state",
    )
    assert end[1].startswith("calibration pass ends: 3 steps, 3 forward passes, ")
    assert end[1].endswith(" s, 0 of 14 layers converged")
    first, *steps, last = logged(logging.DEBUG)
    assert (first, len(steps)) == (begin, 3)
    assert [level for level, _ in steps] == [logging.DEBUG] * 3
    assert steps[0][1].startswith("step 1: 1 forward passes, ")
    assert steps[1][1].startswith("step 2, slowest model.layers.")
    assert last[0] == logging.INFO
    assert logged(logging.WARNING) == []
    assert capsys.readouterr().out == ""


def test_progress_bar_counts_converged_layers(
    llama: nn.Module, texts: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(data: Any, **options: Any) -> list[str]:
        done.append(run(llama, data, lora(tau=0.5), method="gram", progress=True, **options))
        return printed()

    def printed() -> list[str]:
        out, text = capsys.readouterr()
        assert out == ""
        assert text.endswith("\r")  # cleared at its end
        return [line.strip() for line in text.split("\r") if line.strip()]

    def failing() -> Iterator[Any]:
        yield from texts[:2]
        raise OSError("the disk is gone")

    done: list[Any] = []
    begin, first, *_, last = shown(texts, max_steps=2)
    assert begin.startswith("EVA:   0%|")
    assert "| 0/14 [" in first
    assert "slowest" not in first
    converged = sum(done[0].converged.values())
    assert 0 < converged < 14
    assert f"| {converged}/14 [" in last
    assert "layer/s, step 2, slowest model.layers." in last
    with pytest.raises(OSError, match="the disk is gone"):
        shown(failing())
    assert "step 2" in printed()[-1]
    run(llama, texts, max_steps=1)
    assert capsys.readouterr().err == ""


def test_only_the_leader_logs_and_shows_progress(
    llama: nn.Module, texts: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: Any, capsys: Any
) -> None:
    monkeypatch.setattr(CalibrationPass, "is_leader", False)
    with caplog.at_level(logging.INFO, "eva_kernels"):
        run(llama, texts, max_steps=1, progress=True)
    assert capsys.readouterr() == ("", "")
    assert not any("begins" in message for message in caplog.messages)


def test_freeze_converged_and_subspace_criterion_converge(
    llama: nn.Module, texts: list[Any]
) -> None:
    config = lora(tau=0.9)
    for extra in ({"freeze_converged": True}, {"criterion": "subspace"}):
        result = eva_kernels.calibrate(llama, texts, config, progress=False, **extra)
        assert all(result.converged.values())
        assert sum(result.ranks.values()) == 56
    both = {"freeze_converged": True, "criterion": "subspace"}
    result = eva_kernels.calibrate(llama, texts, config, progress=False, **both)
    assert all(result.converged.values())


class EasyAndHard(nn.Module):
    """The input of ``easy`` has one strong direction, that of ``hard`` has none."""

    def __init__(self) -> None:
        super().__init__()
        self.easy, self.hard = nn.Linear(20, 4), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        strong = torch.cat([1000 * x[:, :1], x[:, 1:]], 1)
        return self.easy(strong) + self.hard(x)


def test_frozen_layers_accumulate_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("eva_peft.calibrate")
    passes: list[Any] = []
    original = module.CalibrationPass.run

    def spy(self: Any, loader: Any) -> Any:
        passes.append(self)
        return original(self, loader)

    monkeypatch.setattr(module.CalibrationPass, "run", spy)
    data = list(torch.randn(10, 60, 20))
    config = lora(r=1, rho=1.0, tau=0.9999, target_modules=["easy", "hard"])
    for freeze in (False, True):
        run(EasyAndHard(), iter(data), config, freeze_converged=freeze, method="sketch")
    unfrozen, frozen = (
        {p.targets[i].name: slot.stream.tokens for i, slot in p.collector.slot_of.items()}
        for p in passes
    )
    assert unfrozen == {"easy": 600, "hard": 600}
    assert frozen["easy"] < frozen["hard"] == 600


def test_frozen_layer_with_increased_rank_is_accumulated_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def allocated(run: CalibrationPass) -> dict[int, int]:
        frozen.append(set(run.collector.frozen))
        return {0: 1 if run.steps < 3 else 4, 1: 4}

    monkeypatch.setattr(import_module("eva_peft.calibrate"), "allocate", allocated)
    frozen: list[set[int]] = []
    config = lora(r=4, rho=1.0, tau=0.9999, target_modules=["easy", "hard"])
    options = {"freeze_converged": True, "method": "sketch"}
    run(EasyAndHard(), iter(torch.randn(5, 60, 20)), config, **options)
    assert frozen[:5] == [set(), set(), {0}, {0}, set()]


def test_streams_get_the_options_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[InputStream] = []
    original = CalibrationPass.make_stream

    def record_stream(self: CalibrationPass, *given: Any) -> InputStream:
        streams.append(original(self, *given))
        return streams[-1]

    monkeypatch.setattr(CalibrationPass, "make_stream", record_stream)
    options = {"method": "sketch", "seed": 5, "backend": "torch", "precision": "fast"}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        data = [x.to(dtype) for x in vectors(1)]
        config = lora(target_modules=["0"])
        model = make_mlp().to(dtype)
        result = run(model, data, config, max_steps=1, on_nonfinite="skip", **options)
        assert result.components["0"].dtype == result.singular_values["0"].dtype == torch.float32
    assert [s.dtype for s in streams] == [torch.float64, torch.float32, torch.float32]
    assert {s.options for s in streams} == {Options("sketch", 5, "torch", "fast", True)}


def test_layer_once_converged_stays_converged(llama: nn.Module) -> None:
    # rho = 1: every layer keeps exactly r components, so only similarity decides
    batches = text_batches(24, seed=3)
    config = lora(r=3, rho=1.0, tau=0.97)
    result = eva_kernels.calibrate(llama, batches, config, progress=False, max_steps=400)
    similarity = result.history["similarity"]
    passed = [
        next(step for step, values in enumerate(similarity) if (values[i] or 0.0) >= 0.97)
        for i in range(len(result.ranks))
    ]
    assert result.steps == max(passed) + 1
    # at that step some layer is below tau again, so a rule for all at once would continue
    assert min(similarity[-1]) < 0.97
    assert all(result.converged.values())


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_partial_last_step_does_not_count_for_convergence(method: str) -> None:
    torch.manual_seed(3)
    layer, scale = nn.Sequential(nn.Linear(32, 4)), torch.arange(1, 33) ** -0.5
    data = [torch.randn(n, 32) * scale for n in (64, 64, 64, 1)]
    result = run(layer, iter(data), lora(tau=0.99), method=method)
    assert result.steps == 4
    before, last = (values[0] for values in result.history["similarity"][-2:])
    assert before < 0.99 < last
    assert result.converged == {"0": False}
    options = {"method": method, "progress": False, "on_not_converged": "raise"}
    with pytest.raises(eva_kernels.NotConvergedError, match="after 4 forward passes, 193 tokens"):
        eva_kernels.calibrate(layer, iter(data), lora(tau=0.99), **options)


class RarelyCalled(nn.Module):
    """Two layers; one reads a single token per batch, or constants."""

    def __init__(self, dead: bool) -> None:
        super().__init__()
        self.dead, self.often, self.rarely = dead, nn.Linear(20, 4), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.often(x) + self.rarely(torch.ones_like(x) if self.dead else x[:1])


@pytest.mark.parametrize(("dead", "converged"), [(False, [0, *[1] * 6, 2]), (True, [0, 2])])
def test_no_layer_converges_before_its_second_step(dead: bool, converged: list[int]) -> None:
    """Nor does one of rank zero."""
    config = lora(r=1, rho=2.0, tau=0.0, target_modules=["often", "rarely"])
    result = run(
        RarelyCalled(dead), vectors(12), config, method="sketch"
    )  # its steps have 4 tokens
    assert result.history["converged"] == converged


@pytest.mark.parametrize("criterion", ["cosine", "subspace"])
def test_similarity_is_computed_by_the_criterion(criterion: str) -> None:
    config, data = lora(r=3, rho=1.0, tau=1.0, target_modules=["0"]), vectors(2, rows=60)
    before, after = (
        run(make_mlp(), data, config, method="sketch", criterion=criterion, max_steps=n)
        for n in (1, 2)
    )
    products = before.components["0"].double() @ after.components["0"].double().mT
    expected = products.diag().abs() if criterion == "cosine" else torch.linalg.svdvals(products)
    assert after.history["similarity"] == [[None], [pytest.approx(float(expected.min()), abs=1e-5)]]


def test_allocation_never_exceeds_the_largest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a layer would wait for components that it never gets."""
    allocations: list[dict[int, int]] = []

    def record_ranks(run: CalibrationPass) -> dict[int, int]:
        allocations.append(ranks.allocate(run))
        return allocations[-1]

    monkeypatch.setattr(import_module("eva_peft.calibrate"), "allocate", record_ranks)
    # all of one width, so all track equally many components
    config = lora(rho=1.0, rank_pattern={"lin": 3, "sub.other": 5})
    result = run(Clash(False), vectors(3, features=16), config)
    assert len(allocations) == result.steps
    assert all(list(each.values()) == [3, 3, 5, 4] for each in allocations)


class CalledLater(nn.Module):
    """Two layers; one is called only from the second batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.first, self.second = 0, nn.Linear(20, 4), nn.Linear(20, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = self.first(x)
        return y if self.calls == 1 else self.second(x.sign())  # equal variance in every direction


@pytest.mark.parametrize("options", [{}, {"budget": "params"}, {"min_rank": 3}])
def test_convergence_uses_the_final_allocation(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocations: list[dict[int, int]] = []

    def record_ranks(run: CalibrationPass) -> dict[int, int]:
        allocations.append(ranks.allocate(run))
        return allocations[-1]

    monkeypatch.setattr(import_module("eva_peft.calibrate"), "allocate", record_ranks)
    data = [torch.randn(60, 20) * torch.arange(1, 21) ** -2.0 for _ in range(3)]
    config = lora(tau=1.0, target_modules=["first", "second"])
    result = run(CalledLater(), iter(data), config, method="sketch", **options)
    assert [list(each) for each in allocations] == [[0], [0, 1], [0, 1]]
    assert list(allocations[-1].values()) == list(result.ranks.values())

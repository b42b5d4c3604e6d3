"""Adapters are as before if writing them fails, or a state dict is refused."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import eva_kernels
from eva_kernels import EvaTypeError, EvaValueError
from eva_kernels.streaming import _host
from integration.conftest import (
    lora,
    lora_layers,
    make_llama,
    same_state,
    state_of,
    wrapped,
)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("way", ["adapters", "meta", "base", "two adapters", "rows"])
def test_failed_write_restores_everything(
    error: type[BaseException], way: str, llama_result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eva_peft.lora import adapters

    model: nn.Module = make_llama()
    if way != "base":
        model = wrapped(model, lora(), low_cpu_mem_usage=way == "meta")
    if way == "two adapters":
        model.add_adapter("other", lora(init_lora_weights=True))
    before = state_of(model)
    config = copy.deepcopy(getattr(model, "peft_config", None))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modules = {n: id(m) for n, m in model.named_modules()}
    parameters = {n: id(p) for n, p in model.named_parameters()}
    original = adapters._AdapterWriter.write
    calls: list[str] = []
    write = llama_result.apply
    if way == "rows":
        initialize, rows = eva_kernels.initialize_lora_eva_weights, llama_result.state_dict()
        write = partial(initialize, eva_state_dict=rows)

    def failing(self: Any, name: str, *args: Any) -> None:
        original(self, name, *args)
        calls.append(name)
        if len(calls) == 9:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(adapters._AdapterWriter, "write", failing)
        with pytest.raises(error):
            write(model)
    assert len(calls) == 9
    after = state_of(model)
    meta = [n for n, v in before.items() if v.is_meta]
    assert [n for n, v in after.items() if v.is_meta] == meta
    for name in meta:
        assert before.pop(name).shape == after.pop(name).shape
    assert same_state(before, after)
    assert getattr(model, "peft_config", None) == config
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    if way != "base":
        assert {n: id(m) for n, m in model.named_modules()} == modules
    assert not hasattr(model, "eva_result")
    done = llama_result.apply(model)
    assert sum(layer.r["default"] for layer in lora_layers(done).values()) == 56


@pytest.mark.parametrize("again", [False, True])
def test_failure_in_the_last_step_restores_everything(
    again: bool, llama_result: Any, monkeypatch: Any
) -> None:
    from eva_peft.lora import adapters

    model = llama_result.apply(make_llama()) if again else wrapped(make_llama())
    marks = [dict(vars(parameter)) for parameter in model.parameters()]
    before, config = state_of(model), copy.deepcopy(model.peft_config["default"])
    names = list(model.targeted_module_names)

    def failing(*args: Any) -> str:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "pattern_from_values", failing)
        with pytest.raises(RuntimeError, match="broken"):
            llama_result.apply(model)
    assert same_state(before, state_of(model))
    assert model.peft_config["default"] == config
    assert model.targeted_module_names == names
    assert [vars(parameter) for parameter in model.parameters()] == marks
    assert any(marks) == again


Q_PROJ = "model.layers.0.self_attn.q_proj"


NOT_FINITE = f"holds NaN or infinity in layers {Q_PROJ}; compute it again"


def with_rows(state: dict[str, Any], value: float) -> dict[str, Any]:
    rows = state[Q_PROJ].clone()
    rows[0, 0] = value
    return {**state, Q_PROJ: rows}


INVALID_STATE_DICTS: dict[str, tuple[Any, type[Exception], str]] = {
    "no mapping": (lambda s: list(s.items()), EvaTypeError, "must map layer names .* got .*list"),
    "a result": (lambda s: object(), EvaTypeError, "EvaResult.state_dict return it"),
    "no text": (lambda s: {**s, 3: torch.ones(1, 2)}, EvaTypeError, "names of layers, got 3"),
    "twice": (
        lambda s: {**s, f"module.{Q_PROJ}": s[Q_PROJ]},
        EvaValueError,
        rf"layer {Q_PROJ}: .* has it twice, as '{Q_PROJ}' and 'module.{Q_PROJ}'; remove one",
    ),
    "unknown": (lambda s: {**s, "module.no": torch.ones(1, 2)}, EvaValueError, r"\(module\.no\)"),
    "NaN": (lambda s: with_rows(s, math.nan), EvaValueError, NOT_FINITE),
    "infinity": (lambda s: with_rows(s, -math.inf), EvaValueError, "holds NaN or infinity"),
    "on meta": (lambda s: {**s, Q_PROJ: s[Q_PROJ].to("meta")}, EvaTypeError, "not on the meta"),
}


@pytest.mark.parametrize("kind", INVALID_STATE_DICTS)
def test_invalid_state_dicts_change_nothing(kind: str, llama_result: Any) -> None:
    change, error, message = INVALID_STATE_DICTS[kind]
    model = wrapped(make_llama(), lora())
    before, config = state_of(model), copy.deepcopy(model.peft_config)
    state = change(llama_result.state_dict())
    with pytest.raises(error, match=message):
        eva_kernels.initialize_lora_eva_weights(model, eva_state_dict=state)
    assert same_state(before, state_of(model))
    assert model.peft_config == config


def test_all_rows_are_checked_in_one_read(
    llama_result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    read = _host.read

    def counting(tensors: Any) -> Any:
        calls.append(len(tensors))
        return read(tensors)

    monkeypatch.setattr(_host, "read", counting)
    llama_result.apply(make_llama())
    assert calls == [14]

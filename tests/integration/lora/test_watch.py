"""Warnings and errors where training begins with adapters that were not initialised."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

import eva_kernels
from eva_kernels import (
    EvaCallback,
    EvaValueError,
    NotInitializedError,
    NotInitializedWarning,
    is_initialized,
    watch,
)
from integration.conftest import (
    QUIET,
    hooks_of,
    lora,
    lora_layers,
    make_mlp,
    same_state,
    state_of,
    vectors,
)
from integration.lora.small_models import CONFIG, eva_model, fresh, loaded, partly, trained


def step(model: nn.Module) -> None:
    model.train()
    model(vectors(1)[0]).sum().backward()


def test_watch_warns_once_and_removes_its_hook() -> None:
    model = watch(fresh())
    assert hooks_of(model) == 1
    model.eval()
    model(vectors(1)[0])
    with torch.no_grad():
        model.train()
        model(vectors(1)[0])
    assert hooks_of(model) == 1
    with pytest.warns(NotInitializedWarning, match=r"'default' was made .*initialize\(model, load"):
        step(model)
    assert hooks_of(model) == 0
    step(model)


def test_watch_does_not_warn_without_a_problem() -> None:
    for model in (eva_model(), trained(fresh()), fresh(init_lora_weights=True), make_mlp()):
        step(watch(model))
        assert hooks_of(model) == 0
    model = watch(fresh())
    eva_kernels.initialize(model, vectors(), max_steps=2, **QUIET)
    step(model)


def test_watch_can_raise() -> None:
    model = watch(fresh(), "raise")
    for _ in range(2):  # it raises every time
        with pytest.raises(NotInitializedError, match="never initialised: it trains as plain LoRA"):
            step(model)
    eva_kernels.initialize(model, vectors(), max_steps=2, **QUIET)
    assert hooks_of(model) == 1
    step(model)
    assert hooks_of(model) == 0
    with pytest.raises(EvaValueError, match="action='stop' is unknown"):
        watch(model, "stop")  # type: ignore[arg-type]


def test_watched_model_can_be_copied_and_saved(tmp_path: Any) -> None:
    model = watch(fresh())
    assert same_state(state_of(fresh()), state_of(model))
    torch.save(model, io.BytesIO())
    twin = copy.deepcopy(model)
    with pytest.warns(NotInitializedWarning):
        step(twin)
    model.save_pretrained(tmp_path)


def test_patched_peft_watches_new_adapters() -> None:
    before = peft.get_peft_model
    with eva_kernels.patch_peft():
        assert peft.get_peft_model is not before
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")
            model = peft.get_peft_model(make_mlp(), lora(**CONFIG))
    assert peft.get_peft_model is before
    assert peft.mapping_func.get_peft_model is before
    with pytest.warns(NotInitializedWarning):
        step(model)


class MixedLayers(nn.Module):
    """Layers that EVA reads, some that it cannot read, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.words = nn.Embedding(30, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.words(x)
        return self.linear(self.attention(x, x, x)[0])


@pytest.mark.parametrize("action", ["warn", "raise"])
def test_partly_initialised_adapter_warns(action: Any) -> None:
    message = r"'default' was made .* only a part of it: 1 layer trains as plain LoRA \(2\)\. Call"
    model = watch(partly(fresh()), action)
    with pytest.warns(NotInitializedWarning, match=message):
        step(model)
    assert hooks_of(model) == 0
    with pytest.warns(NotInitializedWarning, match=message):
        EvaCallback(action).on_train_begin(None, None, None, model=model)
    assert is_initialized(model)


def various() -> nn.Module:
    names = ["words", "attention", "linear", "unused"]
    data = [torch.randint(30, (4, 12)) for _ in range(3)]
    with warnings.catch_warnings():  # of layers that keep the default
        warnings.simplefilter("ignore")
        return eva_kernels.initialize(
            MixedLayers(), data, lora(target_modules=names), max_steps=3, min_rank=1, **QUIET
        )


def with_orthonormal_rows() -> nn.Module:
    model = partly(fresh())
    layers = lora_layers(model)
    with torch.no_grad():  # orthonormal, but not written by EVA
        nn.init.orthogonal_(layers["2"].lora_A["default"].weight)
    return model


def partly_as_plain() -> nn.Module:
    model = partly(fresh())
    model.peft_config["default"].init_lora_weights = True
    return model


NO_WARNING_CASES: dict[str, Callable[[Any], nn.Module]] = {
    "left on purpose": lambda folder: various(),
    "loaded": lambda folder: loaded(partly(fresh()), folder),
    "trained": lambda folder: trained(partly(fresh())),
    "rows from elsewhere": lambda folder: with_orthonormal_rows(),
    "another kind": lambda folder: partly_as_plain(),
}


@pytest.mark.parametrize("kind", NO_WARNING_CASES)
def test_intentional_plain_layers_do_not_warn(kind: str, tmp_path: Any) -> None:
    EvaCallback("raise").on_train_begin(None, None, None, model=NO_WARNING_CASES[kind](tmp_path))


def test_inactive_adapters_do_not_warn() -> None:
    model = fresh()
    model.add_adapter("ref", model.peft_config["default"])  # as the reference of DPO
    eva_kernels.initialize(model, vectors(), max_steps=2, **QUIET)
    EvaCallback("raise").on_train_begin(None, None, None, model=model)
    model.set_adapter("ref")
    with pytest.raises(NotInitializedError, match="adapter 'ref' was made with"):
        EvaCallback("raise").on_train_begin(None, None, None, model=model)


def test_callback_warns_or_raises() -> None:
    state: tuple[Any, ...] = (None, None, None)
    with pytest.warns(NotInitializedWarning, match="before the optimizer is made"):
        EvaCallback().on_train_begin(*state, model=fresh())
    with pytest.raises(NotInitializedError):
        EvaCallback("raise").on_train_begin(*state, model=torch.compile(fresh(), backend="eager"))
    with pytest.raises(NotInitializedError):  # SetFit's trainer passes an object that is no module
        EvaCallback("raise").on_train_begin(*state, model=SimpleNamespace(model_body=fresh()))
    for model in (
        eva_model(),
        make_mlp(),
        None,
        SimpleNamespace(model_body=eva_model(), model_head=None),
    ):
        EvaCallback("raise").on_train_begin(*state, model=model)
    with pytest.raises(EvaValueError, match="action='never' is unknown"):
        EvaCallback("never")  # type: ignore[arg-type]

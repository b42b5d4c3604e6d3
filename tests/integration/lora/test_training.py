"""Detection of adapters that were not initialised, and of trained ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn

import eva_kernels
from eva_kernels import (
    EvaCallback,
    EvaRuntimeError,
    EvaTypeError,
    EvaValueError,
    NotInitializedError,
    is_initialized,
)
from integration.conftest import (
    QUIET,
    lora,
    lora_layers,
    make_llama,
    make_mlp,
    output_of,
    perturb_b,
    run,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)
from integration.lora.small_models import CONFIG, eva_model, fresh, loaded, partly, trained


def by_peft(**fields: Any) -> PeftModel:
    model = wrapped(make_llama(), lora(target_modules=["q_proj"], tau=0.5, **fields))
    peft.initialize_lora_eva_weights(model, text_batches(20), show_progress_bar=False)
    return model


def as_dict(model: PeftModel) -> PeftModel:
    """Make the EVA part of the config a dict, as PEFT 0.17 does on loading."""
    config = model.peft_config["default"]
    if not isinstance(config.eva_config, dict):
        config.eva_config = dict(vars(config.eva_config))
    return model


INITIALISED: dict[str, Callable[[Any], nn.Module]] = {
    "initialised": lambda folder: eva_model(),
    "one rank": lambda folder: eva_model(r=1, rho=1.0),
    "whitened": lambda folder: eva_model(whiten=True),
    "bfloat16": lambda folder: eva_model().to(torch.bfloat16),
    "removed layers": lambda folder: eva_model(r=1, rho=8.0),
    "loaded": lambda folder: loaded(eva_model(), folder),
    "loaded, whitened": lambda folder: loaded(eva_model(whiten=True), folder),
    "whitened, settings as read": lambda folder: as_dict(loaded(eva_model(whiten=True), folder)),
    "trained": lambda folder: trained(fresh(init_lora_weights=True)),
    "by PEFT": lambda folder: by_peft(),
    "compiled": lambda folder: torch.compile(eva_model(), backend="eager"),
    "result applied": lambda folder: run(make_mlp(), vectors(), lora(**CONFIG)).apply(fresh()),
}
NOT_INITIALISED: dict[str, Callable[[Any], nn.Module]] = {
    "fresh": lambda folder: fresh(),
    "one rank": lambda folder: fresh(r=1),
    "whitened": lambda folder: fresh(whiten=True),
    "whitened, one rank": lambda folder: fresh(whiten=True, r=1),
    "on meta": lambda folder: get_peft_model(make_mlp(), lora(**CONFIG), low_cpu_mem_usage=True),
    "plain LoRA": lambda folder: fresh(init_lora_weights=True),
    "loaded": lambda folder: loaded(fresh(), folder),
    "wide and in bfloat16": lambda folder: wrapped(
        nn.Sequential(nn.Linear(4096, 8)), lora(r=16, target_modules=["0"])
    ).to(torch.bfloat16),
}


def test_eva_config_as_a_dict_is_read() -> None:
    result = run(fresh(rho=1.0, whiten=True), vectors(), max_steps=3)
    original, again = fresh(rho=1.0, whiten=True), as_dict(fresh(rho=1.0, whiten=True))
    for model in (original, again):
        eva_kernels.initialize(model, vectors(), max_steps=3, **QUIET)
        assert model.eva_result.config.eva_config == result.config.eva_config
    assert same_state(state_of(original), state_of(again))
    applied = result.apply(fresh(), config=as_dict(fresh(whiten=True)).peft_config["default"])
    assert is_initialized(applied)


@pytest.mark.parametrize("kind", INITIALISED)
def test_initialised_adapters_are_recognised(kind: str, tmp_path: Any) -> None:
    assert is_initialized(INITIALISED[kind](tmp_path))


@pytest.mark.parametrize("kind", NOT_INITIALISED)
def test_uninitialised_adapters_are_recognised(kind: str, tmp_path: Any) -> None:
    assert not is_initialized(NOT_INITIALISED[kind](tmp_path))


def test_is_initialized_distinguishes_adapters() -> None:
    model = eva_model()
    model.add_adapter("other", lora(target_modules=["0"], init_lora_weights=True))
    assert is_initialized(model, "default")
    assert not is_initialized(model, "other")


def test_is_initialized_rejects_other_models() -> None:
    with pytest.raises(EvaTypeError, match=r"expected a PeftModel, got .*initialize returns one"):
        is_initialized(make_mlp())
    with pytest.raises(EvaValueError, match=r"no adapter 'mine'; its adapters are \['default'\]"):
        is_initialized(fresh(), "mine")
    with pytest.raises(EvaValueError, match=r"'default' is not a LoRA adapter: its type is IA3"):
        is_initialized(get_peft_model(make_llama(), IA3Config()))


TRAINED_CALLS: dict[str, Callable[[PeftModel, Any], Any]] = {
    "initialize": lambda model, more: eva_kernels.initialize(
        model, vectors(), max_steps=2, **QUIET, **more
    ),
    "apply": lambda model, more: run(make_mlp(), vectors(), lora(**CONFIG)).apply(model, **more),
    "PEFT's name": lambda model, more: eva_kernels.initialize_lora_eva_weights(
        model,
        vectors(),
        prepare_model_inputs_fn=None,
        forward_fn=lambda m, x: m(x),
        show_progress_bar=False,
        max_steps=2,
        on_not_converged="ignore",
        **more,
    ),
    "a state dict": lambda model, more: eva_kernels.initialize_lora_eva_weights(
        model, eva_state_dict=run(make_mlp(), vectors(), lora(**CONFIG)).state_dict(), **more
    ),
}


@pytest.mark.parametrize("call", TRAINED_CALLS)
def test_trained_adapters_need_overwrite_trained(call: str) -> None:
    model = trained(fresh())
    before = state_of(model)
    with pytest.raises(
        EvaValueError, match=r"'default' has been trained.*layers 0, 2.*overwrite_trained=True"
    ):
        TRAINED_CALLS[call](model, {})
    assert same_state(before, state_of(model))
    TRAINED_CALLS[call](model, {"overwrite_trained": True})
    assert not same_state(before, state_of(model))
    assert is_initialized(model)


def test_random_b_is_overwritten_with_allow_any_init() -> None:
    """With ``init_lora_weights=False`` lora_B starts random; any init is overwritten on request."""
    model, config = fresh(init_lora_weights=False), lora(target_modules=["0", "2"])
    with pytest.raises(EvaValueError, match="or was not made with lora_B = 0"):
        eva_kernels.initialize(model, vectors(), config, **QUIET)
    eva_kernels.initialize(model, vectors(), allow_any_init=True, **QUIET)
    assert is_initialized(model)
    assert not any(layer.lora_B["default"].weight.any() for layer in lora_layers(model).values())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_other_ranks_take_nothing_more_from_the_base_weights(init: str) -> None:
    """PEFT takes as many directions out of them as an adapter of these kinds has ranks."""
    model = fresh(init_lora_weights=init)
    before = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    result = run(make_mlp(), vectors(), lora(**CONFIG)).reallocated(r=3, rho=1.0)
    result.apply(model, overwrite_trained=True)
    assert model.peft_config["default"].rank_pattern
    assert all(torch.equal(model.get_parameter(n), weight) for n, weight in before.items())


def dora(dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    model = wrapped(make_mlp().to(dtype), lora(rho=1.0, use_dora=True, **{**CONFIG, **fields}))
    data = [x.to(dtype) for x in vectors()]
    return eva_kernels.initialize(model, data, max_steps=3, **QUIET)


def grow_magnitudes(model: PeftModel, factor: float = 1.5) -> None:
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_magnitude_vector["default"].weight.mul_(factor)


@pytest.mark.parametrize("also_b", [True, False])
def test_trained_magnitudes_are_reset(also_b: bool) -> None:
    """With DoRA the initial output is that of the base model only for the norms of its weights."""
    model, x = dora().eval(), vectors(1)[0]
    kept = {id(p) for p in model.parameters()}
    grow_magnitudes(model)
    if also_b:
        perturb_b(model)
    with pytest.raises(EvaValueError, match=r"'default' has been trained.*layers 0, 2"):
        eva_kernels.initialize(model, vectors(), **QUIET)
    eva_kernels.initialize(model, vectors(), overwrite_trained=True, max_steps=3, **QUIET)
    torch.testing.assert_close(output_of(model, x), output_of(make_mlp(), x))
    assert {id(p) for p in model.parameters()} == kept  # an optimizer may hold them


def test_failed_write_restores_magnitudes(monkeypatch: pytest.MonkeyPatch) -> None:
    from eva_peft.lora import adapters

    def stop(self: Any) -> None:
        raise KeyboardInterrupt

    model, result = dora(), run(make_mlp(), vectors(), lora(rho=1.0, **CONFIG))
    grow_magnitudes(model)
    before = state_of(model)
    monkeypatch.setattr(adapters._AdapterWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        result.apply(model, overwrite_trained=True)
    assert same_state(before, state_of(model))


def test_only_the_written_adapter_is_checked_for_training() -> None:
    model = fresh()
    model.add_adapter("second", lora(**CONFIG))
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            nn.init.ones_(parameter)
    result = run(make_mlp(), vectors(), lora(**CONFIG))
    with pytest.raises(EvaValueError, match="'second' has been trained"):
        result.apply(model, adapter_name="second")
    result.apply(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untrained_magnitudes_do_not_count_as_trained(dtype: torch.dtype, tmp_path: Any) -> None:
    model = dora(dtype)
    model.save_pretrained(tmp_path)
    for base in (make_mlp().to(dtype), make_mlp()):  # also norms of rounded weights
        again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        data = [x.to(base[0].weight.dtype) for x in vectors()]
        eva_kernels.initialize(again, data, max_steps=2, **QUIET)
        grow_magnitudes(again, 1.05)
        with pytest.raises(EvaValueError, match="has been trained"):
            eva_kernels.initialize(again, data, max_steps=2, **QUIET)


def test_trained_magnitudes_of_convolutions_are_reset() -> None:
    def make() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)).eval()

    data = [torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    model = eva_kernels.initialize(
        make(), data, lora(rho=1.0, use_dora=True, target_modules=["0", "2"]), max_steps=3, **QUIET
    ).eval()
    grow_magnitudes(model)
    config = lora(rho=1.0, use_dora=True, target_modules=["0", "2"])
    with pytest.raises(EvaValueError, match="layers 0, 2"):
        eva_kernels.initialize(model, data, config, **QUIET)
    eva_kernels.initialize(model, data, config, overwrite_trained=True, max_steps=3, **QUIET)
    torch.testing.assert_close(output_of(model, data[0]), output_of(make(), data[0]))


def test_trained_adapters_are_rejected_before_any_forward() -> None:
    model, calls = trained(fresh()), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(EvaValueError, match="has been trained"):
        eva_kernels.initialize(model, vectors(), **QUIET)
    assert not calls


@contextmanager
def gathered(parameters: list[Any]) -> Iterator[None]:
    """Mimic DeepSpeed's ``GatheredParameters`` in one process."""
    for parameter in parameters:
        parameter.data = parameter.ds_tensor
    yield
    for parameter in parameters:
        parameter.data = torch.empty(0)


@pytest.mark.parametrize("expected", [True, False])
def test_partitioned_weights_of_zero_3_are_gathered(
    expected: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    model = loaded(eva_model() if expected else fresh(), tmp_path)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_tensor = number, parameter.data
        parameter.data = torch.empty(0)
    assert is_initialized(model) is expected
    if expected:
        EvaCallback("raise").on_train_begin(None, None, None, model=model)
    else:
        with pytest.raises(NotInitializedError):
            EvaCallback("raise").on_train_begin(None, None, None, model=model)
    assert not any(parameter.numel() for parameter in model.parameters())


def test_flattened_weights_cannot_be_checked() -> None:
    """FullyShardedDataParallel keeps a part of each, or its shape without memory."""
    partial, gone = fresh(), fresh()
    for parameter in partial.parameters():
        parameter.data = parameter.data.flatten()[:3]
    for parameter in gone.parameters():
        parameter.data = parameter.data.clone()
        parameter.data.untyped_storage().resize_(0)
    for model in (partial, gone):
        EvaCallback("raise").on_train_begin(None, None, None, model=model)
        with pytest.raises(
            EvaRuntimeError, match="'default' is initialised cannot be determined, since Fully"
        ):
            is_initialized(model)
    model = partly(fresh())  # EVA marks the weights that it writes
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()[:3]
    assert is_initialized(model)
    EvaCallback("raise").on_train_begin(None, None, None, model=model)

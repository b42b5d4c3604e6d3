"""Adapters without a PeftModel, as after ``add_adapter`` of transformers or diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

import eva_kernels
from eva_kernels import (
    EvaCallback,
    EvaValueError,
    EvaWarning,
    NotInitializedError,
    NotInitializedWarning,
)
from integration.conftest import (
    QUIET,
    layer_inputs,
    lora,
    lora_layers,
    lost,
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

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (".*low_cpu_mem_usage", "Already found a `peft_config` attribute")
]


def with_adapter(config: LoraConfig, name: str = "default", model: Any = None) -> Any:
    """Return a model to which transformers has added adapters."""
    model = make_llama() if model is None else model
    try:
        model.add_adapter(config, name)
    except ValueError as error:  # transformers 5.24 needs an unreleased PEFT
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    return model


def test_injected_adapters_equal_those_of_a_peft_model(tmp_path: Any) -> None:
    batches, config = text_batches(6), lora(target_modules=["q_proj", "up_proj", "down_proj"])
    model = with_adapter(config)
    done = eva_kernels.initialize(model, batches, max_steps=6, method="gram", **QUIET)
    assert done is model
    other = wrapped(make_llama(), lora(target_modules=config.target_modules))
    eva_kernels.initialize(other, batches, max_steps=6, method="gram", **QUIET)
    assert done.eva_result.ranks == other.eva_result.ranks
    assert len(set(done.eva_result.ranks.values())) > 1
    inputs = layer_inputs(make_llama(), batches, list(lora_layers(done)))
    for name, layer in lora_layers(done).items():
        assert torch.equal(
            layer.lora_A["default"].weight, lora_layers(other)[name].lora_A["default"].weight
        )
        assert lost(layer.lora_A["default"].weight.detach(), inputs[name]) < 1e-5
        assert not layer.lora_B["default"].weight.any()
    perturb_b(done)
    done.save_pretrained(tmp_path)
    again = make_llama()
    again.load_adapter(tmp_path)
    assert torch.equal(output_of(again, batches[0]), output_of(done, batches[0]))


def test_calibrate_then_apply_leaves_other_adapters() -> None:
    batches, config = text_batches(4), lora(target_modules=["q_proj", "up_proj"])
    model = with_adapter(
        LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False), "first"
    )
    with_adapter(config, "second", model)
    before = {n: v for n, v in state_of(model).items() if ".second." not in n}
    result = run(model, batches, adapter_name="second", max_steps=4)
    assert result.ranks == run(make_llama(), batches, config, max_steps=4).ranks
    assert result.apply(model, adapter_name="second") is model
    after = {n: v for n, v in state_of(model).items() if ".second." not in n}
    assert same_state(before, after)
    sizes = {n: m.r["second"] for n, m in lora_layers(model, "second").items()}
    assert sizes == {n: r for n, r in result.ranks.items() if r}
    with pytest.raises(EvaValueError, match="allow_any_init"):
        eva_kernels.initialize(model, batches, adapter_name="first", **QUIET)


def test_adapters_injected_into_any_module() -> None:
    model = inject_adapter_in_model(lora(target_modules=["0", "2"]), make_mlp())
    assert eva_kernels.initialize(model, vectors(), max_steps=3, **QUIET) is model
    assert model.eva_result.state_dict().keys() == {"0", "2"}
    assert eva_kernels.is_initialized(model)
    state = eva_kernels.get_eva_state_dict(model, vectors(), forward_fn=lambda m, b: m(b))
    assert state.keys() == {"0", "2"}


@pytest.mark.parametrize("call", ["config", "default", "apply"])
def test_base_of_a_peft_model_warns(call: str) -> None:
    """As when a notebook cell runs twice: the returned base would be saved without adapters."""
    base, config = make_llama(), lora(target_modules=["q_proj"])
    first = eva_kernels.initialize(base, text_batches(3), config, max_steps=3, **QUIET)

    def again() -> Any:
        if call == "apply":
            return first.eva_result.apply(base)
        given = config if call == "config" else None
        return eva_kernels.initialize(base, text_batches(3), given, max_steps=3, **QUIET)

    with pytest.warns(
        EvaWarning, match=r"already has the adapters \['default'\].*not a PeftModel"
    ) as warned:
        second = again()
    assert len(warned) == 1
    assert second is base
    assert eva_kernels.initialize(first, text_batches(3), max_steps=3, **QUIET) is first


def test_failure_restores_injected_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    from eva_peft.lora import adapters

    def stop(self: Any) -> None:
        raise KeyboardInterrupt

    model = with_adapter(lora(target_modules=["q_proj", "up_proj"]))
    before, parameters = state_of(model), dict(model.named_parameters())
    monkeypatch.setattr(adapters._AdapterWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        eva_kernels.initialize(model, text_batches(2), max_steps=2, **QUIET)
    assert same_state(before, state_of(model))
    assert not eva_kernels.is_initialized(model)
    assert not hasattr(model, "eva_result")
    assert all(p is parameters[n] for n, p in model.named_parameters())


class BodyAndHead(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class ForwardingBodyAndHead(BodyAndHead):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("body"), name)


@pytest.mark.parametrize("kind", [BodyAndHead, ForwardingBodyAndHead])
@pytest.mark.parametrize("inject", [inject_adapter_in_model, lambda c, m: wrapped(m, c)])
def test_adapters_of_a_submodule_are_reported(inject: Any, kind: type[BodyAndHead]) -> None:
    model = kind(inject(lora(target_modules=["0", "2"]), make_mlp()))
    with pytest.raises(EvaValueError, match=r"a part of the model, body, .*pass that part"):
        eva_kernels.initialize(model, vectors(), **QUIET)
    with pytest.raises(NotInitializedError):
        EvaCallback("raise").on_train_begin(None, None, None, model=model)
    with pytest.warns(NotInitializedWarning):
        eva_kernels.watch(model.train())(vectors()[0])
    body = eva_kernels.initialize(
        model.body, vectors(), forward_fn=lambda _, x: model(x), max_steps=3, **QUIET
    )
    assert body is model.body
    EvaCallback("raise").on_train_begin(None, None, None, model=model)


def test_callback_checks_injected_adapters() -> None:
    model = with_adapter(lora(target_modules=["q_proj"]))
    with pytest.raises(NotInitializedError):
        EvaCallback("raise").on_train_begin(None, None, None, model=model)
    eva_kernels.initialize(model, text_batches(2), max_steps=2, **QUIET)
    EvaCallback("raise").on_train_begin(None, None, None, model=model)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_deleted_adapters_are_ignored() -> None:
    model = with_adapter(LoraConfig(r=3, target_modules=["q_proj"]))
    model.delete_adapter("default")
    config = lora(target_modules=["q_proj"])
    done = eva_kernels.initialize(model, text_batches(2), config, max_steps=2, **QUIET)
    assert sum(done.eva_result.ranks.values()) == 8


def test_unloaded_model_is_a_base_model() -> None:
    base = get_peft_model(make_mlp(), lora(init_lora_weights=True, target_modules=["0"])).unload()
    done = eva_kernels.initialize(base, vectors(), lora(target_modules=["2"]), **QUIET)
    assert done is not base
    assert done.eva_result.ranks.keys() == {"2"}

"""Wrapping a base model: errors before the pass, restored after failures, trainable results."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Event, Thread, current_thread
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn

import eva_kernels
from eva_kernels import EvaError, EvaTypeError, EvaValueError
from eva_peft._peft_compat import (
    new_adapters_on_cpu,
)
from integration.conftest import (
    QUIET,
    lora,
    lora_layers,
    make_llama,
    make_mlp,
    run,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)
from integration.lora.small_models import Attentive


def checkpointed(model: Any) -> nn.Module:
    """Enable checkpointing, for which PEFT puts a hook on the embeddings."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    return model


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Return the structure of a model, in its order."""
    config = getattr(model, "config", None)
    return {
        "modules": [(n, id(m), type(m)) for n, m in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "keys": list(model.state_dict()),
        "hooks": [
            [*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "config": None if config is None else copy.deepcopy(config.to_dict()),
    }


@contextmanager
def check_unchanged(model: nn.Module) -> Iterator[list[int]]:
    """Check that a model is unchanged, and yield a list that grows with every forward pass."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    before, state = structure_of(model), state_of(model)
    yield calls
    assert structure_of(model) == before
    assert same_state(state, state_of(model))
    handle.remove()


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "a norm": (
        {"target_modules": ["q_proj", "input_layernorm"]},
        r"layer model\.layers\.0\.input_layernorm: PEFT cannot wrap it: .*not supported",
    ),
    "a parameter with one dimension": (
        {"target_modules": ["q_proj"], "target_parameters": ["input_layernorm.weight"]},
        r"model\.layers\.0\.input_layernorm\.weight has 1 dimensions; LoRA and EVA support matri",
    ),
    "tokens of an unknown layer": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"nope": [1]}},
        "PEFT cannot wrap the model with this LoraConfig: .*'nope'.* not found",
    ),
    "replicated layers": (
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
        r"layer_replication changes the layers.*first wrap it with peft.get_peft_model",
    ),
    "rank 0": ({"r": 0}, "^r=0 must be at least 1"),
    "a negative rank": ({"r": -2}, "^r=-2 must be at least 1"),
    "a fractional rank": ({"r": 2.5}, r"^r=2.5 must be a whole number"),
    "rank 0 of a layer": (
        {"rank_pattern": {"q_proj": 0}},
        r"^rank_pattern\['q_proj'\]=0 must be at least 1",
    ),
    "an infinite alpha": ({"lora_alpha": math.inf}, "^lora_alpha=inf must be finite"),
    "an alpha that is no number": ({"lora_alpha": "8"}, "^lora_alpha='8' must be a number"),
    "an alpha of a layer that is NaN": (
        {"alpha_pattern": {"q_proj": math.nan}},
        r"^alpha_pattern\['q_proj'\]=nan must be finite",
    ),
    "no label mask value": ({"label_mask_value": None}, "^label_mask_value=None must be a number"),
    "names that are no strings": (
        {"target_modules": [3]},
        r"^target_modules=\{3\} must name layers",
    ),
    "a number for names": ({"exclude_modules": 3}, "^exclude_modules=3 must name layers"),
    "ranks without names": ({"rank_pattern": [3]}, r"^rank_pattern=\[3\] must be a mapping"),
    "a broken expression": (
        {"target_modules": "(q_proj"},
        r"^target_modules: '\(q_proj' is not a regular expression \(missing \)",
    ),
    "a broken expression in a pattern": (
        {"alpha_pattern": {"q_proj[": 3}},
        r"^alpha_pattern: 'q_proj\[' is not a regular expression \(unterminated",
    ),
}


@pytest.mark.filterwarnings("ignore:EVA reads the inputs of linear layers")
@pytest.mark.parametrize("case", REJECTED)
def test_configs_that_peft_rejects_fail_before_the_pass(case: str) -> None:
    check_rejected(*REJECTED[case])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 takes flags anywhere")
def test_flags_within_the_expression_that_peft_makes_of_a_pattern_are_rejected() -> None:
    text = r"^rank_pattern: '\(\?i\)Q_proj' is not a regular expression \(global flags"
    check_rejected({"rank_pattern": {"(?i)Q_proj": 3}}, text)


def check_rejected(fields: dict[str, Any], text: str) -> None:
    model = checkpointed(make_llama().train())
    with check_unchanged(model) as calls:
        with pytest.raises((EvaValueError, EvaTypeError), match=text):
            eva_kernels.initialize(model, text_batches(2), lora(**fields), max_steps=2, **QUIET)
        assert not calls


def test_a_label_mask_value_that_is_not_read_may_be_missing() -> None:
    config = lora(use_label_mask=False, label_mask_value=None)
    eva_kernels.initialize(make_mlp(), vectors(), config, max_steps=3, **QUIET)


@pytest.mark.parametrize("name", ["a.b", "", 3])
def test_invalid_adapter_names_are_rejected(name: Any) -> None:
    with check_unchanged(make_mlp()) as calls:
        with pytest.raises(
            EvaValueError, match=r"adapter_name=.* must be a non-empty string without a dot"
        ):
            eva_kernels.initialize(make_mlp(), vectors(1), adapter_name=name, **QUIET)
        assert not calls


def test_dry_run_changes_nothing_and_does_not_warn() -> None:
    module = import_module("eva_peft.lora.wrapping")
    config = lora(modules_to_save=["lm_head"], trainable_token_indices=[1, 2], use_dora=True)
    model = make_llama().train()
    with check_unchanged(model), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        module.check_wrapping(model, config, "default")
    assert not warned


def test_wrapping_that_fails_only_on_meta_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("eva_peft.lora.wrapping")
    original, on_meta = module.get_peft_model, []

    def picky(*args: Any, **kwargs: Any) -> Any:
        on_meta.append(torch.empty(0).is_meta)
        if on_meta[-1]:
            raise RuntimeError("Expected all tensors to be on the same device")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "get_peft_model", picky)
    model = eva_kernels.initialize(
        make_mlp(), vectors(), lora(target_modules=["0"]), max_steps=2, **QUIET
    )
    assert on_meta == [True, False, False]
    assert sum(model.eva_result.ranks.values()) == 4


@pytest.mark.parametrize(
    "error_type", [TypeError, ValueError, RuntimeError, torch.OutOfMemoryError]
)
def test_errors_of_peft_keep_their_type(error_type: type[Exception], monkeypatch: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error_type("too much of it")

    monkeypatch.setattr(import_module("eva_peft.lora.wrapping"), "get_peft_model", fail)
    model = make_mlp()
    with check_unchanged(model) as calls:
        with pytest.raises(error_type, match="too much of it") as caught:
            eva_kernels.initialize(model, vectors(1), lora(target_modules=["0"]), **QUIET)
        assert not calls
    is_wrapped = "PEFT cannot wrap the model with this LoraConfig" in str(caught.value)
    assert (
        is_wrapped
        == isinstance(caught.value, EvaError)
        == (error_type is not torch.OutOfMemoryError)
    )


def test_other_threads_are_not_affected_by_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("eva_peft.lora.wrapping")
    original, devices = LoraModel._create_and_replace, []

    def elsewhere(self: Any, *args: Any, **kwargs: Any) -> None:
        thread = Thread(target=lambda: devices.append(nn.Linear(2, 2).weight.device.type))
        thread.start()
        thread.join()
        original(self, *args, **kwargs)
        devices.append(self.model[0].lora_A["default"].weight.device.type)

    monkeypatch.setattr(LoraModel, "_create_and_replace", elsewhere)
    module.check_wrapping(make_mlp(), lora(target_modules=["0"]), "default")
    assert devices == ["cpu", "meta"]


def test_two_threads_restore_the_warning_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("eva_peft.lora.wrapping")
    inside, done = [Event(), Event()], Event()
    original, filters = LoraModel._create_and_replace, list(warnings.filters)
    shown: Any = vars(warnings)["_showwarnmsg_impl"]

    def overlapping(self: Any, *args: Any, **kwargs: Any) -> None:
        number = int(current_thread().name)
        inside[number].set()
        (done if number else inside[1]).wait(0.5)  # the first to enter is the first to leave
        original(self, *args, **kwargs)

    def check() -> None:
        module.check_wrapping(make_mlp(), lora(target_modules=["0"]), "default")
        done.set()

    monkeypatch.setattr(LoraModel, "_create_and_replace", overlapping)
    threads = [Thread(target=check, name=str(number)) for number in range(2)]
    threads[0].start()
    assert inside[0].wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert done.is_set()
    assert warnings.filters == filters
    assert vars(warnings)["_showwarnmsg_impl"] == shown


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("number", [1, 5, 14])
def test_interrupted_wrapping_restores_the_model(
    error: type[BaseException], number: int, llama_result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = LoraModel._create_and_replace, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        calls.append(kwargs["current_key"])
        if len(calls) == number:
            raise error("stop")

    model = checkpointed(make_llama())
    with check_unchanged(model), monkeypatch.context() as patch:
        patch.setattr(LoraModel, "_create_and_replace", failing)
        with pytest.raises(error):
            llama_result.apply(model)
        assert len(calls) == number
    assert sum(m.r["default"] for m in lora_layers(llama_result.apply(model)).values()) == 56


CONFIG_FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient checkpointing": {"checkpointing": True},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "trainable tokens": {"trainable_token_indices": [1, 2]},
    "bias": {"bias": "all"},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("case", CONFIG_FIELDS)
def test_failed_write_restores_the_base_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from eva_peft.lora import adapters

    def stop(self: Any) -> None:
        raise KeyboardInterrupt

    fields = dict(CONFIG_FIELDS[case])
    model = make_llama().train()
    if fields.pop("checkpointing", False):
        checkpointed(model)
    model.lm_head.weight.requires_grad_(False)
    monkeypatch.setattr(adapters._AdapterWriter, "finish", stop)
    with check_unchanged(model), pytest.raises(KeyboardInterrupt):
        eva_kernels.initialize(
            model, text_batches(1), lora(target_modules=["q_proj"], **fields), max_steps=1, **QUIET
        )


def test_failed_write_restores_flags_of_a_frozen_adapter(
    llama_result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eva_peft.lora import adapters

    model = wrapped(make_llama(), lora())
    model.add_adapter("other", lora(init_lora_weights=True))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.requires_grad_(False)
    original, calls = adapters.update_layer, []

    def failing(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(adapters, "update_layer", failing)
    with check_unchanged(model), pytest.raises(KeyboardInterrupt):
        llama_result.apply(model)


def names_of_peft(model: nn.Module, data: Any) -> PeftModel:
    model = wrapped(model, lora())
    eva_kernels.initialize_lora_eva_weights(model, data, show_progress_bar=False, max_steps=2)
    return model


WAYS: dict[str, Callable[[nn.Module, Any], PeftModel]] = {
    "initialize": lambda model, data: eva_kernels.initialize(
        model, data, lora(), max_steps=2, **QUIET
    ),
    "apply": lambda model, data: run(model, data, lora(), max_steps=2).apply(model),
    "apply, other ranks": lambda model, data: run(model, data, lora(), max_steps=2).apply(
        model, r=3
    ),
    "DoRA": lambda model, data: eva_kernels.initialize(
        model, data, lora(use_dora=True), max_steps=2, **QUIET
    ),
    "PEFT's name": names_of_peft,
}


@pytest.mark.filterwarnings("ignore::eva_kernels.NotConvergedWarning")
@pytest.mark.parametrize("way", WAYS)
def test_results_in_inference_mode_are_trainable(way: str) -> None:
    model, data = make_llama(), text_batches(2)
    with torch.inference_mode():
        done = WAYS[way](model, data)
        assert torch.is_inference_mode_enabled()
    plain = {n: p.requires_grad for n, p in WAYS[way](make_llama(), data).named_parameters()}
    assert {n: p.requires_grad for n, p in done.named_parameters()} == plain
    assert not any(p.is_inference() for p in done.parameters())
    done.train()(**data[0], labels=data[0]["input_ids"]).loss.backward()
    assert all(m.lora_B["default"].weight.grad.any() for m in lora_layers(done).values())


def test_failed_write_restores_an_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from eva_peft.lora import adapters

    def stop(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapters._AdapterWriter, "finish", stop)
    model, config = Attentive(), lora(target_modules=["lin", "mha"])
    with check_unchanged(model), pytest.raises(KeyboardInterrupt):
        eva_kernels.initialize(model, vectors(4), config, max_steps=2, **QUIET)


def test_mixed_models_are_rejected() -> None:
    config = lora(target_modules=["q_proj"], init_lora_weights=True)
    model = get_peft_model(make_llama(), config, mixed=True)
    result = run(make_llama(), text_batches(1), config, max_steps=1)
    with check_unchanged(model) as calls:
        for call in (
            lambda: eva_kernels.initialize(model, text_batches(1), config, **QUIET),
            lambda: result.apply(model),
        ):
            with pytest.raises(EvaTypeError, match="cannot initialise a PeftMixedModel"):
                call()
        assert not calls


def test_new_adapters_on_cpu_restores_the_layer() -> None:
    layer = next(iter(lora_layers(wrapped(make_mlp(), lora())).values()))
    before = {*vars(layer)}
    with new_adapters_on_cpu(layer):
        assert {*vars(layer)} - before
    assert {*vars(layer)} == before

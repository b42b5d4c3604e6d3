"""Modes, flags, hooks and random states are as before after a pass, however it ended."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache

import eva_kernels
from eva_kernels import EvaValueError
from eva_peft.errors import EvaRuntimeError
from integration.conftest import (
    QUIET,
    hooks_of,
    lora,
    lora_layers,
    make_llama,
    make_mlp,
    perturb_b,
    run,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)

BATCHES = text_batches(3)


class Before:
    """The state of a model and of the process that a pass must restore."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = state_of(model)
        self.values = self.describe()

    def describe(self) -> dict[str, Any]:
        model = self.model
        return {
            "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
            "other hooks": [len(m._forward_hooks) for m in model.modules()],
            "modes": {n: m.training for n, m in model.named_modules()},
            "flags": {n: p.requires_grad for n, p in model.named_parameters()},
            "grads": {n: p.grad for n, p in model.named_parameters()},
            "cache": model.config.use_cache,
            "adapters": {n: m.disable_adapters for n, m in lora_layers(model).items()},
            "random": torch.get_rng_state().tolist(),
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
            "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "ids": {n: id(p) for n, p in model.named_parameters()},
        }

    def check_unchanged(self) -> bool:
        assert same_state(self.state, state_of(self.model))
        now = self.describe()
        for key, value in self.values.items():
            assert now[key] == value, key
        return True


def model_in_mixed_modes(prepared: bool) -> nn.Module:
    """Return a model in train mode with parts in eval mode, hooks of the user and a cache."""
    model: nn.Module = make_llama()
    model = wrapped(model) if prepared else model
    model.train()
    inner = model.get_submodule("base_model.model" if prepared else "")
    inner.model.layers[0].mlp.eval()
    inner.model.norm.eval()
    inner.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: None)
    inner.model.layers[1].register_forward_hook(lambda *_: None)
    inner.lm_head.weight.requires_grad_(True)
    assert inner.config.use_cache
    return model


class Broken(Exception):
    pass


def failing_loader(model: nn.Module) -> Iterator[Any]:
    yield BATCHES[0]
    torch.rand(5)
    raise Broken("loader")


def failing_callback(numbers: dict[str, Any]) -> None:
    raise Broken("callback")


def failing_forward(model: nn.Module, batch: Any) -> None:
    model(**batch)
    raise Broken("forward")


def interrupt_hook(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    stream = import_module("eva_kernels.streaming.stream").InputStream
    original, calls = stream.add, []

    def add(self: Any, *args: Any, **options: Any) -> int:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    patch.setattr(stream, "add", add)


def interrupt_fold(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    def fold(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    patch.setattr(import_module("eva_peft.calibrate"), "begin_fold", fold)


def interrupt_registration(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    original, calls = nn.Module.register_forward_pre_hook, []

    def register(self: nn.Module, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    patch.setattr(nn.Module, "register_forward_pre_hook", register)


CASES: dict[str, tuple[type[BaseException], Any, dict[str, Any], Any]] = {
    "forward": (Broken, BATCHES, {"forward_fn": failing_forward}, None),
    "loader": (Broken, failing_loader, {}, None),
    "callback": (Broken, BATCHES, {"callback": failing_callback}, None),
    "interrupt in a hook": (KeyboardInterrupt, BATCHES, {}, interrupt_hook),
    "interrupt in a fold": (KeyboardInterrupt, BATCHES, {}, interrupt_fold),
    "interrupt at the start": (KeyboardInterrupt, BATCHES, {}, interrupt_registration),
    "not converged": (
        eva_kernels.NotConvergedError,
        BATCHES,
        {"max_steps": 1, "on_not_converged": "raise"},
        None,
    ),
    "not iterable": (TypeError, 5, {}, None),
    "empty": (ValueError, [], {}, None),
}


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_state_is_restored_after_a_failure(
    case: str, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, loader, options, sabotage = CASES[case]
    model = model_in_mixed_modes(prepared)
    config = None if prepared else lora()
    before = Before(model)
    with monkeypatch.context() as patch:
        if sabotage is not None:
            sabotage(model, patch)
        data = loader(model) if callable(loader) else loader
        with pytest.raises(error):
            eva_kernels.initialize(model, data, config, **{**QUIET, **options})
    assert before.check_unchanged()
    assert not hasattr(model, "eva_result")
    done = eva_kernels.initialize(model, BATCHES, config, max_steps=3, **QUIET)
    assert sum(done.eva_result.ranks.values()) == 56


@pytest.mark.parametrize("prepared", [True, False])
def test_state_is_restored_after_success(prepared: bool) -> None:
    model = model_in_mixed_modes(prepared)
    before = Before(model)
    run(model, BATCHES, None if prepared else lora(), max_steps=3)
    assert before.check_unchanged()
    modes = [(n, m, m.training) for n, m in model.named_modules()]
    done = eva_kernels.initialize(
        model, BATCHES, None if prepared else lora(), max_steps=3, **QUIET
    )
    assert torch.get_rng_state().tolist() == before.values["random"]
    assert sum(before.values["hooks"]) == 1
    assert hooks_of(done) == 2
    for name, module, mode in modes:
        assert module.training == mode, name
    assert not any(m.disable_adapters for m in lora_layers(done).values())


def test_disabled_adapters_stay_disabled() -> None:
    model = wrapped(make_llama())
    with model.disable_adapter():
        run(model, BATCHES, max_steps=2)
        assert all(m.disable_adapters for m in lora_layers(model).values())
    assert not any(m.disable_adapters for m in lora_layers(model).values())


class MergesInEvalMode(nn.Linear):
    """Merges its change into the weight in eval mode, as layers of loralib do."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.change = nn.Parameter(torch.ones(width, width))

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:
            self.weight.data += self.change.data * (-1 if mode else 1)
        return super().train(mode)

    def forward(self, x: Any) -> Any:
        return super().forward(x) + (x @ self.change.T if self.training else 0)


@pytest.mark.parametrize("modes", [(True, True), (True, False), (False, True), (False, False)])
def test_layers_that_change_weights_in_train_are_restored(modes: tuple[bool, bool]) -> None:
    model = nn.Sequential(nn.Linear(20, 20), MergesInEvalMode(20))
    model.train(modes[0])[1].train(modes[1])
    before, output = state_of(model), model(vectors()[0])
    run(model, vectors(), lora(target_modules=["0"]), max_steps=2)
    assert [part.training for part in model] == list(modes)
    torch.testing.assert_close(state_of(model), before)
    torch.testing.assert_close(model(vectors()[0]), output)


def test_other_modules_are_restored_if_one_fails_in_train() -> None:
    class Fails(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            if mode:
                raise MemoryError("no room for kernels")
            return super().train(mode)

    model = wrapped(nn.Sequential(nn.Linear(20, 20), Fails(20, 20)), lora(target_modules=["0"]))
    model.training = model.base_model.model[1].training = True
    before = [(name, part.training) for name, part in model.named_modules()]
    with pytest.raises(MemoryError, match="no room"):
        run(model, vectors(), max_steps=2)
    assert [(name, part.training) for name, part in model.named_modules()] == before
    assert not any(m.disable_adapters for m in lora_layers(model).values())
    assert hooks_of(model) == 0


def test_forward_fn_may_disable_adapters() -> None:
    model = wrapped(make_mlp(), lora(target_modules=["0", "2"]))
    frozen = lora_layers(model)["0"].lora_A["default"].weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}

    def run_reference(model: Any, batch: Any) -> None:  # as DPO does
        with model.disable_adapter():
            model(batch)
        frozen.requires_grad_()

    run(model, vectors(), forward_fn=run_reference, max_steps=2)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert any(before.values())


def test_no_cache_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    original = DynamicCache.update

    def update(self: Any, *args: Any, **options: Any) -> Any:
        built.append(1)
        return original(self, *args, **options)

    monkeypatch.setattr(DynamicCache, "update", update)
    model = make_llama()
    run(model, BATCHES, lora(), max_steps=2)
    assert not built
    assert model.config.use_cache
    model(**BATCHES[0])
    assert built  # so the spy works


def test_pass_runs_in_eval_mode_without_gradients() -> None:
    modes: list[tuple[bool, bool]] = []

    def forward(model: nn.Module, batch: Any) -> None:
        modes.append((torch.is_grad_enabled(), any(m.training for m in model.modules())))
        model(**batch)

    run(model_in_mixed_modes(True), BATCHES, max_steps=3, forward_fn=forward)
    assert modes == [(False, False)] * 3


@pytest.mark.parametrize("name", ["default", "other"])
def test_merged_adapters_are_rejected(name: str) -> None:
    model = wrapped(make_llama(), lora(init_lora_weights=True))
    model.add_adapter("other", lora(init_lora_weights=True))
    perturb_b(model, name)
    model.merge_adapter([name])
    with pytest.raises(eva_kernels.EvaRuntimeError, match=r"merged adapters.*unmerge_adapter"):
        run(model, BATCHES, lora())


def test_hooks_of_the_user_are_kept() -> None:
    model, fired = make_llama(), []
    hook: Callable[..., None] = lambda *_: fired.append(1)  # noqa: E731
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(hook)
    done = eva_kernels.initialize(model, BATCHES, lora(), max_steps=2, **QUIET)
    fired.clear()
    done(**BATCHES[0])
    assert fired == [1]


def test_result_is_equal_in_train_and_eval_mode() -> None:
    base = run(make_llama(), iter(BATCHES), lora(tau=1.0))
    other = run(make_llama().train(), iter(BATCHES), lora(tau=1.0))
    assert all(torch.equal(rows, other.components[n]) for n, rows in base.components.items())


def test_overlapping_passes_in_threads_restore_global_switches() -> None:
    """Each restores the global switches as they were before the first."""
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    began, graphs = [threading.Event(), threading.Event()], []

    def first(model: Any, batch: Any) -> None:  # ends while the other pass runs
        began[0].set()
        assert began[1].wait(20)
        model(batch)

    def second(model: Any, batch: Any) -> None:
        began[1].set()
        thread.join(20)
        assert not torch.backends.mha.get_fastpath_enabled()
        model(batch)

    def calibrate(forward: Any) -> None:
        config = lora(target_modules=["0"])
        run(make_mlp(), iter(vectors(1)), config, forward_fn=forward)

    thread = threading.Thread(target=calibrate, args=(first,))
    thread.start()
    assert began[0].wait(20)
    calibrate(second)
    assert torch.backends.mha.get_fastpath_enabled()

    def remember(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x * 2, backend=remember)(torch.ones(3))
    assert len(graphs) == 1


@pytest.mark.parametrize("adapted", [False, True])
def test_second_pass_on_the_same_model_is_rejected(adapted: bool) -> None:
    model = wrapped(make_llama(), lora(tau=1.0)) if adapted else make_llama()
    config = None if adapted else lora(tau=1.0)
    errors_at = []

    def again(numbers: Any) -> None:
        with pytest.raises(EvaRuntimeError, match="another calibration pass is running on this"):
            run(model, iter(text_batches(1)), config)
        errors_at.append(numbers["step"])

    result = run(model, iter(text_batches(2)), config, callback=again)
    assert len(errors_at) == result.forwards == 2
    assert run(model, iter(text_batches(1)), config).forwards == 1  # afterwards the model is free


def test_pass_on_a_part_of_a_model_in_use_is_rejected() -> None:
    model, errors_at = make_llama(), []

    def again(numbers: Any) -> None:
        with pytest.raises(EvaRuntimeError, match="on this model, or on a part of it"):
            run(model.model, iter(text_batches(1)), lora())
        errors_at.append(numbers["step"])

    run(model, iter(text_batches(1)), lora(tau=1.0), callback=again)
    assert errors_at
    assert run(model.model, iter(text_batches(1)), lora()).forwards == 1


@pytest.mark.parametrize("shared", [nn.GELU(), nn.Dropout(), nn.PReLU()])
def test_models_in_use_may_share_only_stateless_modules(shared: nn.Module) -> None:
    one, other = (nn.Sequential(nn.Linear(8, 8), shared) for _ in range(2))
    data, ran = [torch.randn(40, 8)], []
    is_rejected = not isinstance(shared, nn.GELU)  # its mode or weights belong to the other pass

    def again(numbers: Any) -> None:
        with pytest.raises(EvaRuntimeError) if is_rejected else nullcontext():
            ran.append(run(other, iter(data), lora(target_modules=["0"])).tokens)

    run(one, iter(data), lora(target_modules=["0"]), callback=again)
    assert ran == ([] if is_rejected else [40])


def test_disabled_fast_path_stays_disabled() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        run(make_mlp(), iter(vectors(1)), lora())
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_config_that_forwards_use_cache_is_restored() -> None:
    class Composite:
        def __init__(self, inner: Any) -> None:
            object.__setattr__(self, "inner", inner)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.inner, name, value)

    outer: Any = nn.Sequential(nn.Linear(20, 20))
    inner = SimpleNamespace(use_cache=True)
    outer.config, outer[0].config = Composite(inner), inner
    run(outer, iter(vectors(1)), lora(target_modules=["0"]))
    assert inner.use_cache


def test_frozen_config_is_accepted() -> None:
    @dataclass(frozen=True)
    class Frozen:
        use_cache: bool = True

    model: Any = make_mlp()
    model.config = Frozen()
    assert run(model, iter(vectors(1)), lora()).forwards == 1


def test_weights_on_meta_are_rejected() -> None:
    with torch.device("meta"):
        model = make_llama()
    with pytest.raises(EvaValueError, match="on the meta device: load them first"):
        run(model, iter(text_batches(1)), lora())
    assert eva_kernels.estimate(model, lora(), batch_shape=(2, 8)).peak_bytes > 0


def test_failure_while_setting_switches_restores_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    config = lora(target_modules=["0"])

    def failing(enabled: bool) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mha, "set_fastpath_enabled", failing)
        with pytest.raises(KeyboardInterrupt):
            run(make_mlp(), iter(vectors(1)), config)
    states: list[bool] = []

    def forward(model: Any, batch: Any) -> None:
        states.append(torch.backends.mha.get_fastpath_enabled())
        model(batch)

    run(make_mlp(), iter(vectors(1)), config, forward_fn=forward)
    assert states == [False]
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch._dynamo.eval_frame._stance.stance == "default"

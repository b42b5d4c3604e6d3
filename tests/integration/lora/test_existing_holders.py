"""Adapters whose sizes EVA changes while an optimizer, DDP or ZeRO-3 already holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import eva_kernels
from eva_kernels import EvaRuntimeError, EvaTypeError
from eva_peft.lora import adapters
from eva_peft.model.targets import find_targets
from integration.conftest import QUIET, Clash, lora, lora_layers, run, state_of, vectors, wrapped

CONFIG = lora(target_modules=["lin", "other"])  # lin reads more than sub.lin, which reads zeros
DATA = [x[:, :16] for x in vectors()]


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for x in DATA[:3]:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_optimizer_trains_adapters_of_changed_size() -> None:
    model = wrapped(Clash(), CONFIG)
    before = {n: m.lora_A["default"].weight for n, m in lora_layers(model).items()}
    kept = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(kept, lr=0.01)
    step_before = before["lin"].detach().clone()
    model(DATA[0]).sum().backward()  # gradients of the previous sizes
    eva_kernels.initialize(model, DATA, max_steps=3, **QUIET)
    layers = lora_layers(model)
    assert set(model.eva_result.ranks.values()) != {4}
    assert all(m.lora_A["default"].weight is before[n] for n, m in layers.items())
    assert before["lin"].shape != step_before.shape
    assert all(p.grad is None or p.grad.shape == p.shape for p in kept)
    train_steps(model.train(), optimizer)
    assert all(m.lora_B["default"].weight.any() for m in layers.values())


def test_kept_output_does_not_prevent_new_sizes() -> None:
    model = wrapped(Clash(), CONFIG)
    kept = model(DATA[0])  # as after a first look in a notebook
    eva_kernels.initialize(model, DATA, max_steps=3, **QUIET)
    assert set(model.eva_result.ranks.values()) != {4}
    parameters = [p for p in model.parameters() if p.requires_grad]
    train_steps(model.train(), torch.optim.AdamW(parameters, lr=0.01))
    assert all(m.lora_B["default"].weight.any() for m in lora_layers(model).values())
    assert kept.requires_grad


def test_failure_restores_sizes_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(Clash(), CONFIG)
    model(DATA[0]).sum().backward()
    before = {n: (p, p.data.clone(), p.grad) for n, p in model.named_parameters()}
    monkeypatch.setattr(adapters._AdapterWriter, "finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        eva_kernels.initialize(model, DATA, max_steps=3, **QUIET)
    for name, parameter in model.named_parameters():
        same, data, grad = before[name]
        assert parameter is same
        assert torch.equal(parameter.data, data)
        assert parameter.grad is grad


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_changed_sizes_in_ddp_are_rejected(process_group: None) -> None:
    model = wrapped(Clash(), CONFIG)
    outer = nn.parallel.DistributedDataParallel(model)
    before, calls = state_of(model), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    result = run(outer, DATA, max_steps=3)
    assert calls
    calls.clear()
    for call in (
        lambda: eva_kernels.initialize(outer, DATA, **QUIET),
        lambda: eva_kernels.initialize_lora_eva_weights(outer, DATA, **QUIET),
        lambda: result.apply(outer),
        lambda: eva_kernels.initialize_lora_eva_weights(outer, eva_state_dict=result.state_dict()),
    ):
        with pytest.raises(EvaRuntimeError, match="pass inner, and wrap what is returned"):
            call()
    with pytest.raises(EvaRuntimeError, match="the model is wrapped in DistributedDataParallel"):
        eva_kernels.initialize(torch.compile(outer, backend="eager"), DATA, **QUIET)
    assert not calls
    fewer = {n: torch.eye(len(rows), 16)[:2] for n, rows in result.state_dict().items()}
    with pytest.raises(EvaRuntimeError, match="relies on the current sizes"):  # nor smaller sizes
        eva_kernels.initialize_lora_eva_weights(outer, eva_state_dict=fewer)
    assert all(torch.equal(value, before[n]) for n, value in state_of(model).items())
    base = nn.parallel.DistributedDataParallel(Clash())
    for call in (
        lambda: eva_kernels.initialize(base, DATA, lora(rho=1.0), **QUIET),
        lambda: result.apply(base, r=4, rho=1.0),
    ):
        with pytest.raises(
            EvaRuntimeError, match="the model is wrapped in DistributedDataParallel"
        ):
            call()


def test_changed_sizes_are_rejected_while_ddp_exists(process_group: None) -> None:
    outer = nn.parallel.DistributedDataParallel(wrapped(Clash(), CONFIG))
    model, before = outer.module, state_of(outer.module)
    result = run(model, DATA, max_steps=3)
    for call in (
        lambda: eva_kernels.initialize(model, DATA, **QUIET),
        lambda: eva_kernels.initialize_lora_eva_weights(model, DATA, **QUIET),
        lambda: result.apply(model),
    ):
        with pytest.raises(
            EvaRuntimeError, match=r"drop this wrapper \(inner = model\.module; del model"
        ):
            call()
    assert all(torch.equal(value, before[n]) for n, value in state_of(model).items())
    base = nn.parallel.DistributedDataParallel(Clash())
    with pytest.raises(EvaRuntimeError, match="the model is wrapped in DistributedDataParallel"):
        eva_kernels.initialize(base.module, [], CONFIG, **QUIET)  # before any batch is read
    other = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))  # which does not contain the model
    del outer
    eva_kernels.initialize(model, DATA, max_steps=3, **QUIET)
    new_ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    parameters = [p for p in new_ddp.parameters() if p.requires_grad]
    train_steps(new_ddp.train(), torch.optim.AdamW(parameters, lr=0.01))
    assert all(m.lora_B["default"].weight.any() for m in lora_layers(model).values())
    assert other.module.weight.requires_grad


def test_unchanged_sizes_in_ddp_are_trained(process_group: None) -> None:
    model = wrapped(Clash(), lora(rho=1.0, target_modules=["head", "other"]))
    outer = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in outer.parameters() if p.requires_grad], lr=0.01)
    eva_kernels.initialize_lora_eva_weights(
        outer, DATA, show_progress_bar=False, max_steps=3, on_not_converged="ignore"
    )
    assert eva_kernels.initialize(outer, DATA, max_steps=3, **QUIET) is model
    assert model.eva_result.ranks == {"sub.other": 4, "head": 4}
    train_steps(outer.train(), optimizer)
    assert all(m.lora_B["default"].weight.any() for m in lora_layers(model).values())


def test_zero_3_parameters_are_rejected() -> None:
    model = wrapped(Clash(), CONFIG)
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id = i  # type: ignore[attr-defined]
    with pytest.raises(EvaRuntimeError, match=r"sharded by DeepSpeed \(ZeRO-3\)"):
        eva_kernels.initialize(model, DATA, **QUIET)


def test_sizes_of_layers_with_zero_3_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 4), Conv1D(3, 4))
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.data = i, torch.empty(0)  # type: ignore[attr-defined]
    found = find_targets(model, lora(target_modules=["0", "1"]), "default")
    assert [(t.in_features, t.out_features) for t in found] == [(6, 4), (4, 3)]


def test_parameters_that_are_views_are_initialised() -> None:
    """As those cut out of the factors of a weight by another initialisation."""
    model = wrapped(Clash(), CONFIG)
    for parameter in model.parameters():
        parameter.data = torch.cat([parameter.detach(), parameter.detach()])[: len(parameter)]
    eva_kernels.initialize(model, DATA, **QUIET)
    assert eva_kernels.is_initialized(model)


def in_deepspeed_engine(model: nn.Module) -> nn.Module:
    """Wrap a model as DeepSpeed's engine does."""
    forward = {"forward": lambda self, x: self.module(x)}
    engine = type("DeepSpeedHybridEngine", (type("DeepSpeedEngine", (nn.Module,), forward),), {})()
    engine.module = model
    return engine


def test_model_in_a_deepspeed_engine_keeps_its_layer_names() -> None:
    results = [run(model, DATA, CONFIG) for model in (Clash(), in_deepspeed_engine(Clash()))]
    assert results[0].ranks == results[1].ranks


def test_parameters_flattened_by_deepspeed_are_rejected() -> None:
    """DeepSpeed's optimizer keeps them in one buffer and would restore its copies."""
    model = wrapped(Clash(), CONFIG)
    result = eva_kernels.calibrate(model, DATA, **QUIET)
    parts = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = torch.cat([part.detach().flatten() for part in parts])
    for part, view in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.data = view.view_as(part)
    before, engine = flat.clone(), in_deepspeed_engine(wrapped(Clash(), CONFIG))
    calls: tuple[Any, ...] = (
        lambda: eva_kernels.initialize(model, DATA, **QUIET),
        lambda: eva_kernels.initialize_lora_eva_weights(model, DATA),
        lambda: result.apply(model),
        lambda: result.apply(engine),
        lambda: eva_kernels.initialize(engine, DATA, **QUIET),
        lambda: eva_kernels.initialize_lora_eva_weights(engine, DATA),
    )
    for call in calls:
        with pytest.raises(EvaRuntimeError, match=r"Initialise before deepspeed\.initialize"):
            call()
    assert torch.equal(flat, before)


def test_zero_3_runs_every_forward_to_its_end() -> None:
    model = Clash()
    ended = []
    model.register_forward_hook(lambda module, args, output: ended.append(len(args[0])))
    config = lora(target_modules=["lin"], tau=1.0)
    loader = [DATA[0], DATA[1], DATA[0][:0], DATA[2]]
    options = {**QUIET, "max_steps": 4, "group": None}
    eva_kernels.calibrate(model, loader, config, **options)
    assert len(ended) < 4  # neither the head nor a batch without tokens is run
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id = i  # type: ignore[attr-defined]
    ended.clear()
    eva_kernels.calibrate(model, loader, config, **options)
    assert ended == [40, 40, 0, 40]  # the processes wait for each other in every forward pass


def test_pipeline_stage_is_rejected() -> None:
    pipeline = pytest.importorskip("transformers.distributed.pipeline_parallel")
    model = wrapped(Clash(), CONFIG)
    model.base_model.model.head = pipeline.PipelineIdentityLayer()
    with pytest.raises(EvaRuntimeError, match="layer head is on another stage of a pipeline"):
        eva_kernels.calibrate(model, DATA, **QUIET)


@pytest.mark.parametrize("model", [object(), "model", None])
def test_model_that_is_no_module_is_rejected(model: Any) -> None:
    for call in (eva_kernels.initialize, eva_kernels.calibrate):
        with pytest.raises(EvaTypeError, match=r"expected a torch\.nn\.Module, got .*unet"):
            call(model, DATA)

"""Scenarios in which weights (FSDP) or layers (tensor parallelism) are divided among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PeftModel, import_utils
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import eva_kernels
from distributed.scenarios import (
    calibrate,
    failing_batches,
    group_with_timeout,
    own_batches,
    scenario,
    shared_folder,
)
from eva_peft.processes import data_parallel
from integration.conftest import QUIET, lora, make_llama, text_batches, wrapped


def sharded(model: Any) -> Any:
    """Shard the weights of a model by FSDP, block by block."""
    base = model.base_model.model if isinstance(model, PeftModel) else model
    for block in base.model.layers:
        fully_shard(block)
    return fully_shard(model)


def error_name(run: Callable[[], Any]) -> str | None:
    try:
        run()
    except eva_kernels.EvaError as error:
        return type(error).__name__
    return None


# PEFT before 0.21.1 cannot load adapters into layers divided by newer transformers.
PEFT_LOADS_DIVIDED = find_spec("transformers.distributed") is None or hasattr(
    import_utils, "is_transformers_dtensor_tp"
)


@scenario
def adapters_in_shards(rank: int) -> Any:
    """Return the reported state of adapters, initialised or not, after sharding."""
    ids = own_batches(rank)[0]["input_ids"]

    def states_of(model: Any) -> Any:
        sharded(eva_kernels.watch(model, "raise"))
        callback = eva_kernels.EvaCallback("raise")
        return [
            eva_kernels.is_initialized(model),
            error_name(lambda: callback.on_train_begin(None, None, None, model=model)),
            error_name(lambda: model.train()(input_ids=ids, labels=ids).loss.backward()),
        ]

    done, plain = wrapped(make_llama(), lora()), wrapped(make_llama(), lora())
    eva_kernels.initialize(done, own_batches(rank), **QUIET)
    found = {"initialised": states_of(done), "not initialised": states_of(plain)}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    found |= {"trained": eva_kernels.is_initialized(plain), "dora": _dora_in_shards()}
    return {**found, "flattened": [_flattened(own) for own in (True, False)]}


def _dora_in_shards() -> list[bool]:
    """Return the state of sharded DoRA magnitudes with whole base weights: new, and trained."""
    model, found = wrapped(make_llama(), lora(init_lora_weights=True, use_dora=True)), []
    fully_shard(model, ignored_params={p for n, p in model.named_parameters() if "lora_" not in n})
    for step in (0.0, 1.0):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.add_(step)
        found.append(eva_kernels.is_initialized(model))
    return found


def _flattened(own: bool) -> list[str | None]:
    """Return errors for trained adapters flattened by FSDP, with or without original parameters."""
    model = wrapped(make_llama(), lora()).requires_grad_()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    result, cpu = calibrate(make_llama(), own_batches(0), max_steps=1), torch.device("cpu")
    flat = FullyShardedDataParallel(model, use_orig_params=own, device_id=cpu)
    callback = eva_kernels.EvaCallback("raise")
    return [
        error_name(lambda: eva_kernels.is_initialized(model)),
        error_name(lambda: callback.on_train_begin(None, None, None, model=flat)),
        error_name(lambda: result.apply(flat)),
    ]


@scenario
def initialised_in_shards(rank: int) -> Any:
    found = {}
    for name, model in (("adapters", wrapped(make_llama(), lora())), ("base", make_llama())):
        config = lora() if name == "base" else None
        try:
            eva_kernels.initialize(sharded(model), own_batches(rank), config, **QUIET)
        except eva_kernels.EvaError as error:
            found[name] = (type(error).__name__, str(error))
    return found


@scenario
def calibrated_in_shards(rank: int) -> Any:
    found, options = {}, {"max_steps": 4, "method": "gram", "group": group_with_timeout()}
    for name, model in (("in shards", sharded(make_llama())), ("flattened", flattened())):
        with shared_folder() as folder:  # a checkpoint must recognise a sharded model
            path = folder / "pass.safetensors"
            found[name] = calibrate(model, own_batches(rank), checkpoint=path, **options)
    return found


def flattened() -> nn.Module:
    """Return a model whose blocks are sharded by FSDP 1, which renames parameters."""
    blocks = ModuleWrapPolicy({LlamaDecoderLayer})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(make_llama(), auto_wrap_policy=blocks, device_id=cpu)


def batches_of_different_lengths(rank: int) -> list[dict[str, Tensor]]:
    """Return batches of equal lengths in process 0, of one long and short texts in process 1."""
    batches = text_batches(3, samples=12, length=60, padded=False, seed=rank)
    for batch in batches if rank else ():
        batch["attention_mask"][1:, 4:] = 0
    return batches


@scenario
def batch_lengths_differ(rank: int) -> Any:
    return calibrate(make_llama(), batches_of_different_lengths(rank), max_steps=3, method="gram")


@scenario
def batch_lengths_differ_in_shards(rank: int) -> Any:
    return calibrate(
        sharded(make_llama()), batches_of_different_lengths(rank), max_steps=3, method="gram"
    )


@scenario
def numbers_of_batches_differ_in_shards(rank: int) -> Any:
    return calibrate(sharded(make_llama()), iter(own_batches(rank, 4 - rank)), max_steps=9)


@scenario
def loader_fails_in_shards(rank: int) -> Any:
    return calibrate(sharded(make_llama()), failing_batches(rank))


@scenario
def batch_fails_in_shards(rank: int) -> Any:
    ragged = {"input_ids": [[1, 2], [3]]}
    data = [*own_batches(rank, 2), *([ragged] if rank == 1 else own_batches(rank, 1))]
    return calibrate(sharded(make_llama()), data)


def nan_input_in_shards(rank: int) -> Any:
    model = sharded(make_llama())

    def spoil(module: nn.Module, args: tuple[Tensor]) -> Any:
        return (args[0] * float("nan"),) if rank == 1 else None

    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(spoil)
    return calibrate(model, own_batches(rank))


@scenario
def nan_in_layer_in_shards(rank: int) -> Any:
    return nan_input_in_shards(rank)


@scenario
def shards_without_a_group(rank: int) -> Any:
    return calibrate(sharded(make_llama()), own_batches(rank), group=None)


@scenario
def shards_in_smaller_groups(rank: int) -> Any:
    groups = [distributed.new_group([r]) for r in (0, 1)]
    return calibrate(sharded(make_llama()), own_batches(rank), group=groups[rank])


@scenario
def flattened_in_smaller_groups(rank: int) -> Any:
    groups = [distributed.new_group([r]) for r in (0, 1)]
    flat = FullyShardedDataParallel(make_llama(), device_id=torch.device("cpu"))
    return calibrate(flat, own_batches(rank), group=groups[rank])


@scenario
def shards_of_one_process_leave_the_group(rank: int) -> Any:
    """Calibrate where only the second process shares its shards with one outside the group."""
    shards = mock.patch.object(data_parallel, "sharding_ranks", return_value={rank, 2 * rank})
    with shards, mock.patch.object(data_parallel, "sharded_by", return_value="FSDP"):
        return calibrate(make_llama(), own_batches(rank), group=group_with_timeout())


@scenario
def replicated_shards_without_a_group(rank: int) -> Any:
    """Calibrate in each process alone a model whose every copy is sharded over one process."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(make_llama(), mesh=mesh)
    return calibrate(model, own_batches(rank, 4 - rank), max_steps=4 - rank, group=None)


@scenario
def replicated_shards_twice(rank: int) -> Any:
    """Calibrate in the sharding group, and again when FSDP has left the weights whole."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(make_llama(), mesh=mesh)
    for _ in range(2):
        result = calibrate(model, own_batches(rank), group=mesh.get_group("shard"))
    return result


@contextmanager
def saved(model: Any) -> Iterator[Path]:
    """Save a model in the first process, and yield the shared folder."""
    with shared_folder() as folder:
        if distributed.get_rank() == 0:
            model.save_pretrained(folder)
        distributed.barrier()
        yield folder


def by_transformers() -> nn.Module:
    with saved(make_llama()) as folder:
        return LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")


def by_torch() -> nn.Module:
    model, mesh = make_llama(), init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        plan = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
        parallelize_module(block, mesh, {**plan, "mlp.down_proj": RowwiseParallel()})
    return model


@scenario
def divided(rank: int) -> Any:
    """Return the errors of all functions that would run or change a model with divided layers."""
    result = calibrate(make_llama(), own_batches(rank), max_steps=1)
    calls: dict[str, Callable[[Any], Any]] = {
        "calibrate": lambda model: calibrate(model, own_batches(0)),
        "alone": lambda model: calibrate(model, own_batches(0), group=None),
        "initialize": lambda model: eva_kernels.initialize(model, own_batches(0), lora(), **QUIET),
        "wrapped": lambda model: eva_kernels.initialize(wrapped(model), own_batches(0), **QUIET),
        "apply": result.apply,
    }
    found = {}
    for make in (by_transformers, by_torch):
        for name, call in calls.items():
            try:
                call(make())
            except eva_kernels.EvaRuntimeError as error:
                found[f"{name}, divided {make.__name__}"] = str(error)
    return found


@scenario
def first_divided_by_transformers(rank: int) -> Any:
    """Return the first layer that transformers divides, which depends on its version."""
    whole, parts = dict(make_llama().named_parameters()), by_transformers().named_parameters()
    here = ((name, getattr(part, "_local_tensor", part).shape) for name, part in parts)
    return next(name for name, shape in here if shape != whole[name].shape).rpartition(".")[0]


@scenario
def adapters_loaded_into_divided_model(rank: int) -> Any:
    """Initialise the whole model and load its adapters into the divided one, as errors advise."""
    whole = eva_kernels.initialize(make_llama(), own_batches(rank), lora(), **QUIET, max_steps=3)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02)
    with saved(whole) as folder:
        model = PeftModel.from_pretrained(by_transformers(), folder)
    with torch.no_grad():
        outputs = [m(**own_batches(0)[0]).logits for m in (whole.eval(), model.eval())]
    return [eva_kernels.is_initialized(model), *outputs]

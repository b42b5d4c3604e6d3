"""Run scenarios of a pass over two processes, and write what each of them saw; for torchrun."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaForCausalLM

import eva_kernels
from eva_kernels.streaming import InputStream
from eva_peft import data_parallel
from integration.conftest import QUIET, lora, make_llama, text_batches, wrapped

SCENARIOS: dict[str, Callable[[int], Any]] = {}


def scenario(run: Callable[[int], Any]) -> Callable[[int], Any]:
    SCENARIOS[run.__name__] = run
    return run


class Counted(AbstractContextManager["Counted"]):
    """Count the calls of a method."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name, self.calls = kind, name, 0

    def __enter__(self) -> Counted:
        self.original = original = getattr(self.kind, self.name)

        def counting(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return original(*arguments, **options)

        setattr(self.kind, self.name, counting)
        return self

    def __exit__(self, *exception: object) -> None:
        setattr(self.kind, self.name, self.original)


def calibrate(model: nn.Module, data: Any, **options: Any) -> eva_kernels.EvaResult:
    return eva_kernels.calibrate(model, data, lora(), **{**QUIET, **options})


def own_batches(rank: int, count: int = 4) -> list[dict[str, Tensor]]:
    return text_batches(count, padded=False, seed=10 + rank)


@scenario
def sketch(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), max_steps=4, method="sketch")


@scenario
def gram(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), max_steps=4, method="gram")


@scenario
def counted(rank: int) -> Any:
    """Return how many streams were merged, and how often tokens were added, with freezing."""
    merged, added = Counted(InputStream, "merge"), Counted(InputStream, "add")
    with merged, added:
        options = {"max_steps": 8, "freeze_converged": True, "tokens_per_step": 40}
        calibrate(make_llama(), own_batches(rank), **options)
    return {"merged": merged.calls, "added": added.calls}


@scenario
def budgets_differ(rank: int) -> Any:
    # A plan may depend on the memory of a device: enough for exact streams in process 0 alone.
    budget = 1 << 30 if rank == 0 else 200_000
    return calibrate(make_llama(), own_batches(rank), max_steps=3, memory_budget=budget)


@scenario
def given_group(rank: int) -> Any:
    group = distributed.new_group([0, 1])
    return calibrate(make_llama(), own_batches(rank), max_steps=4, method="sketch", group=group)


@scenario
def group_of_one(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), max_steps=4, group=distributed.new_group([0]))


@scenario
def alone(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), max_steps=4, group=None)


@scenario
def loaders_of_other_lengths(rank: int) -> Any:
    return calibrate(make_llama(), iter(own_batches(rank, 2 if rank == 0 else 5)))


@scenario
def leader_goes_on_alone(rank: int) -> Any:
    return calibrate(make_llama(), iter(own_batches(rank, 5 if rank == 0 else 2)))


@scenario
def converged_and_frozen(rank: int) -> Any:
    config = lora(tau=0.5)
    options = {"max_steps": 30, "freeze_converged": True, **QUIET}
    return eva_kernels.calibrate(make_llama(), own_batches(rank), config, **options)


class Experts(nn.Module):
    """Each token goes to the layer that its first feature names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.expert = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.expert):
            rows = (x[:, 0] == i).nonzero().flatten()
            if len(rows):
                out[rows] = expert(x[rows])
        return out


def routed_tokens(rank: int, step: int) -> Tensor:
    """Tokens for experts 0 and 1 in process 0, for 1 and 2 in process 1; for 3 in step 2 alone."""
    torch.manual_seed(100 * rank + step)
    x = torch.randn(120, 24) * torch.linspace(3, 0.1, 24)
    x[:, 0] = torch.arange(120) % 2 + rank
    if step == 2:
        x[:40, 0] = 3
    return x


@scenario
def experts(rank: int) -> Any:
    data = [routed_tokens(rank, step) for step in range(4)]
    config = lora(target_modules=[f"expert.{i}" for i in range(4)])
    options = {**QUIET, "prepare_model_inputs_fn": None, "max_steps": 4}
    return eva_kernels.calibrate(Experts(), data, config, **options)


class Sharing(nn.Module):
    """Two layers that read one tensor, or copies of it."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.shared = shared
        self.a, self.b = nn.Linear(24, 8), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x if self.shared else x.clone())


@scenario
def inputs_shared_in_one_process_only(rank: int) -> Any:
    torch.manual_seed(rank)
    data = [torch.randn(80, 24) * torch.linspace(3, 0.1, 24) for _ in range(3)]
    config = lora(target_modules=["a", "b"])
    return eva_kernels.calibrate(Sharing(rank == 0), data, config, max_steps=3, **QUIET)


@scenario
def initialised(rank: int) -> Any:
    model = eva_kernels.initialize(make_llama(), own_batches(rank), lora(), max_steps=3, **QUIET)
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@scenario
def follower_fails(rank: int) -> Any:
    def broken() -> Iterator[Any]:
        yield from own_batches(rank, 2)
        if rank == 1:
            raise OSError("the disk is gone")
        yield from own_batches(rank, 2)

    return calibrate(make_llama(), broken())


@scenario
def leader_fails(rank: int) -> Any:
    def fail(numbers: Any) -> None:
        raise OSError("the report is gone")

    return calibrate(make_llama(), own_batches(rank), callback=fail)


@scenario
def not_converged(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), max_steps=2, on_not_converged="raise")


@scenario
def no_tokens(rank: int) -> Any:
    batches = own_batches(rank, 2)
    for batch in batches:
        batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    return calibrate(make_llama(), batches, max_steps=50)


@scenario
def other_models(rank: int) -> Any:
    config = lora(target_modules=["q_proj"] if rank == 0 else ["q_proj", "v_proj"])
    return eva_kernels.calibrate(make_llama(), own_batches(rank), config, max_steps=2, **QUIET)


@scenario
def other_ranks(rank: int) -> Any:
    config = lora(r=8 if rank == 0 else 4)
    return eva_kernels.calibrate(make_llama(), own_batches(rank), config, max_steps=2, **QUIET)


@scenario
def other_options(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), tokens_per_step=40 * (1 + rank), seed=rank)


@scenario
def fails_before(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), memory_budget=1 if rank == 1 else "auto")


@scenario
def leader_finds_no_layer(rank: int) -> Any:
    config = lora(target_modules=["nothing"] if rank == 0 else ["q_proj"])
    return eva_kernels.calibrate(make_llama(), own_batches(rank), config, **QUIET)


@scenario
def other_weights(rank: int) -> Any:
    model = make_llama()
    if rank == 1:  # as a loader leaves it that reads the file in the first process only
        torch.manual_seed(1)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
    return calibrate(model, own_batches(rank), max_steps=2)


@scenario
def one_layer_is_new(rank: int) -> Any:
    model = make_llama()
    torch.manual_seed(rank)
    nn.init.normal_(model.model.layers[1].mlp.down_proj.weight)
    return calibrate(model, own_batches(rank), max_steps=2)


@scenario
def merging_fails(rank: int) -> Any:
    def fail(*arguments: Any) -> None:
        raise OSError("the memory is gone")

    with mock.patch.object(data_parallel, "restore_stream", fail):
        return calibrate(make_llama(), own_batches(rank))


@scenario
def checkpointed(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), checkpoint="never-written.safetensors")


def sharded(model: Any) -> Any:
    """Divide the weights of a model, block by block, among the processes."""
    base = model.base_model.model if isinstance(model, PeftModel) else model
    for block in base.model.layers:
        fully_shard(block)
    return fully_shard(model)


def told_of(run: Callable[[], Any]) -> str | None:
    try:
        run()
    except eva_kernels.EvaError as error:
        return type(error).__name__
    return None


@scenario
def trained_in_shards(rank: int) -> Any:
    """Return what is told of adapters, which were initialised or not, after they were divided."""
    ids = own_batches(rank)[0]["input_ids"]

    def look(model: Any) -> Any:
        sharded(eva_kernels.watch(model, "raise"))
        callback = eva_kernels.EvaCallback("raise")
        return [
            eva_kernels.is_initialized(model),
            told_of(lambda: callback.on_train_begin(None, None, None, model=model)),
            told_of(lambda: model.train()(input_ids=ids, labels=ids).loss.backward()),
        ]

    done, plain = wrapped(make_llama(), lora()), wrapped(make_llama(), lora())
    eva_kernels.initialize(done, own_batches(rank), **QUIET)
    found = {"initialised": look(done), "not initialised": look(plain)}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    return {**found, "trained": eva_kernels.is_initialized(plain), "dora": _dora_in_shards()}


def _dora_in_shards() -> list[bool]:
    """Look at magnitudes in shards, of weights that are whole: as made, and trained."""
    model, found = wrapped(make_llama(), lora(init_lora_weights=True, use_dora=True)), []
    fully_shard(model, ignored_params={p for n, p in model.named_parameters() if "lora_" not in n})
    for step in (0.0, 1.0):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.add_(step)
        found.append(eva_kernels.is_initialized(model))
    return found


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
    model = sharded(make_llama())
    return calibrate(model, own_batches(rank), max_steps=4, method="gram")


def of_other_lengths(rank: int) -> list[dict[str, Tensor]]:
    """Return batches of one length in process 0; in the other a long text among short ones."""
    batches = text_batches(3, samples=12, length=60, padded=False, seed=rank)
    for batch in batches if rank else ():
        batch["attention_mask"][1:, 4:] = 0
    return batches


@scenario
def lengths_differ(rank: int) -> Any:
    return calibrate(make_llama(), of_other_lengths(rank), max_steps=3, method="gram")


@scenario
def lengths_differ_in_shards(rank: int) -> Any:
    return calibrate(sharded(make_llama()), of_other_lengths(rank), max_steps=3, method="gram")


@scenario
def shards_have_other_numbers_of_batches(rank: int) -> Any:
    return calibrate(sharded(make_llama()), iter(own_batches(rank, 4 - rank)), max_steps=9)


@scenario
def loader_fails_in_shards(rank: int) -> Any:
    def broken() -> Iterator[Any]:
        yield from own_batches(rank, 2)
        if rank == 1:
            raise OSError("the disk is gone")
        yield from own_batches(rank, 2)

    return calibrate(sharded(make_llama()), broken())


@scenario
def layer_fails_in_shards(rank: int) -> Any:
    model = sharded(make_llama())

    def spoil(module: nn.Module, args: tuple[Tensor]) -> Any:
        return (args[0] * float("nan"),) if rank == 1 else None

    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(spoil)
    return calibrate(model, own_batches(rank))


@scenario
def shards_without_a_group(rank: int) -> Any:
    return calibrate(sharded(make_llama()), own_batches(rank), group=None)


@contextmanager
def saved(model: Any) -> Iterator[str]:
    """Save a model in the first process, for all."""
    with TemporaryDirectory() as own:
        folder = [own]
        distributed.broadcast_object_list(folder)
        if distributed.get_rank() == 0:
            model.save_pretrained(own)
        distributed.barrier()
        yield folder[0]
        distributed.barrier()


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
    """Return what is said of models with divided layers, by whatever would run or write them."""
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
def loaded_where_it_is_divided(rank: int) -> Any:
    """Follow the advice that is given: initialise the whole model, load into the divided one."""
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


@scenario
def no_group(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), group="all")


def plain(result: Any) -> Any:
    """Return what a test looks at."""
    if not isinstance(result, eva_kernels.EvaResult):
        return result
    names = ("ranks", "components", "singular_values", "explained_variance_ratio", "converged")
    names += ("tokens", "steps", "forwards", "shared_inputs", "uncalled", "method")
    return {name: getattr(result, name) for name in names}


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, found = distributed.get_rank(), {}
    for name, run in SCENARIOS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = plain(run(rank))
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
        distributed.barrier()
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

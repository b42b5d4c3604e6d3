"""The faulty calls of the fault table, on the models of ``fault_setup``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import eva_kernels
from eva_kernels import EvaResult
from integration.conftest import QUIET, lora, make_llama, make_mlp, perturb_b, run, vectors, wrapped
from integration.fault_setup import MLP, Setup


class Broken(Exception):
    """An error raised by the user's own code."""


def on_llama(setup: Setup, batches: Any, config: Any = None, **options: Any) -> Any:
    return eva_kernels.initialize(
        setup.llama, batches, config or setup.config, **{**QUIET, **options}
    )


def on_mlp(setup: Setup, data: Any = None, config: Any = None, **options: Any) -> Any:
    data = setup.data if data is None else data
    return eva_kernels.initialize(
        setup.mlp, data, config or setup.mlp_config, **{**QUIET, **options}
    )


def option(**value: Any) -> Callable[[Setup], Any]:
    return lambda s: on_mlp(s, **value)


def state_dict(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Setup], Any]:
    def call(setup: Setup) -> Any:
        state = quick_result().state_dict()
        change(state)
        return eva_kernels.initialize_lora_eva_weights(setup.peft, eva_state_dict=state)

    return call


def result_file(content: Callable[[Path], Any]) -> Callable[[Setup], Any]:
    def call(setup: Setup) -> Any:
        path = setup.folder / "eva.safetensors"
        content(path)
        return EvaResult.load(path).apply(setup.peft)

    return call


def quick_result() -> EvaResult:
    with torch.random.fork_rng(devices=[]):
        return run(make_mlp(), vectors(), lora(**MLP), max_steps=2)


def saved_bytes(path: Path) -> bytes:
    quick_result().save(path)
    return path.read_bytes()


def checkpoint(second: Callable[[Setup, Path], Any]) -> Callable[[Setup], Any]:
    def call(setup: Setup) -> Any:
        path = setup.folder / "pass.safetensors"
        with torch.random.fork_rng(devices=[]):
            run(make_mlp(), vectors(), lora(tau=1.0, **MLP), max_steps=3, checkpoint=path)
        return second(setup, path)

    return call


def bad_values(value: float) -> Callable[[Setup], Any]:
    def call(setup: Setup) -> Any:
        data = [x.clone() for x in setup.data]
        data[1][3, 2] = value
        return on_mlp(setup, data, lora(tau=1.0, **MLP))

    return call


def raising_iterator(number: int) -> Iterator[Tensor]:
    yield from vectors()[:number]
    raise Broken("disk")


class RaisesAtOnce:
    def __iter__(self) -> Iterator[Tensor]:
        raise Broken("no file")


class DictInput(nn.Module):
    """A model whose layer is called with a dict instead of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = DictInputLinear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a({"x": x})


class DictInputLinear(nn.Linear):
    def forward(self, x: Any) -> Tensor:
        return super().forward(x["x"])


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(20, 4, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.to(torch.complex64)).abs()


def fail(*args: Any, **kwargs: Any) -> Any:
    raise Broken("mine")


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def merged_adapter(setup: Setup) -> Any:
    model = wrapped(make_mlp(), lora(init_lora_weights=True, **MLP))
    perturb_b(model)
    model.merge_adapter()
    return eva_kernels.calibrate(setup.add_model(model), setup.data, **QUIET)


def other_adapter_merged(setup: Setup, write: bool = False) -> Any:
    model = wrapped(make_mlp(), lora(target_modules=["0"]))
    model.add_adapter("other", lora(init_lora_weights=True, target_modules=["2"]))
    perturb_b(model, "other")
    model.base_model.merge_adapter(["other"])
    if write:
        result = run(make_mlp(), vectors(), lora(target_modules=["0"]), max_steps=2)
        return result.apply(setup.add_model(model))
    return eva_kernels.calibrate(setup.add_model(model), setup.data, **QUIET)


def prompt_model(setup: Setup) -> Any:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = setup.add_model(get_peft_model(make_llama(), config))
    return eva_kernels.initialize(model, setup.texts, lora(), **QUIET)


def adalora_config(setup: Setup) -> Any:
    return on_mlp(setup, config=AdaLoraConfig(total_step=9, **MLP))


def trained_adapter(setup: Setup) -> Any:
    model = wrapped(make_mlp(), lora(**MLP))
    perturb_b(model)
    return eva_kernels.initialize(setup.add_model(model), setup.data, **QUIET)


def two_active_adapters(setup: Setup) -> Any:
    model = wrapped(make_mlp(), lora(**MLP))
    model.add_adapter("other", lora(init_lora_weights=True, **MLP))
    model.base_model.set_adapter(["default", "other"])
    return eva_kernels.initialize_lora_eva_weights(setup.add_model(model), setup.data)


def float16_overflow(setup: Setup) -> Any:
    model = setup.add_model(make_llama(torch.float16))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(6e4)
    setup.snapshot()
    return eva_kernels.initialize(model, setup.texts, setup.config, **QUIET)


def fewer_batches(setup: Setup, path: Path) -> Any:
    config = lora(tau=1.0, **MLP)
    return eva_kernels.calibrate(
        setup.mlp, iter(vectors()[:2]), config, checkpoint=path, max_steps=9, **QUIET
    )


def resume(setup: Setup, path: Path, **options: Any) -> Any:
    return on_mlp(setup, config=lora(tau=1.0, **MLP), checkpoint=path, max_steps=9, **options)


def truncated_file(setup: Setup, path: Path) -> Any:
    path.write_bytes(path.read_bytes()[:-200])
    return resume(setup, path)


def another_file(setup: Setup, path: Path) -> Any:
    path.unlink()
    save_file({"x": torch.zeros(2)}, path)
    return resume(setup, path)

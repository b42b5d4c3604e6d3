"""EVA, as implemented by PEFT and by this package."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

from peft import EvaConfig, PeftModel, get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.lora import eva
from torch import Tensor, nn

import eva_kernels

from ..meter import Meter
from ..peft_eva import end_pass
from ._job import Batch, Job, Method, count_forward, forward, wrap_seeded


def _make_adapted(model: nn.Module, job: Job) -> PeftModel:
    config = job.config(init_lora_weights="eva", eva_config=EvaConfig(rho=job.rho, tau=job.tau))
    return wrap_seeded(model, config, job.seed, low_cpu_mem_usage=True)


def _start_peft(model: nn.Module, job: Job, meter: Meter) -> PeftModel:
    """Initialise with PEFT's functions, stopped after ``max_forwards``.

    The first of its forward passes, which only hashes inputs, counts.
    """
    with meter.phase("apply"):
        adapted = _make_adapted(model, job)
    forwards_before = meter.forwards

    def run(module: nn.Module, batch: Batch) -> None:
        forward(module, batch, meter)
        if meter.forwards - forwards_before >= job.max_forwards:
            end_pass(module)

    with meter.phase("collect"), _timed_as_solve(meter), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_eva_state_dict(
            adapted, job.batches, forward_fn=run, show_progress_bar=False, **_peft_functions(job)
        )
    with meter.phase("apply"):
        initialize_lora_eva_weights(adapted, eva_state_dict=state)
    return adapted


def _timed_as_solve(meter: Meter) -> Any:
    step = eva.IncrementalPCA.partial_fit

    def partial_fit(self: Any, *args: Any, **kwargs: Any) -> Any:
        with meter.phase("solve"):
            return step(self, *args, **kwargs)

    return mock.patch.object(eva.IncrementalPCA, "partial_fit", partial_fit)


def _peft_functions(job: Job) -> dict[str, Any]:
    """Return the arguments that let PEFT's EVA run on inputs other than text."""

    def rows(layer_input: tuple[Tensor, ...], model_input: Any, name: str) -> Tensor:
        return layer_input[0].reshape(-1, layer_input[0].shape[-1])

    if job.text:
        return {}
    return {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": rows}


def _start_ours(**options: Any) -> Callable[[nn.Module, Job, Meter], PeftModel]:
    def start(model: nn.Module, job: Job, meter: Meter) -> PeftModel:
        with meter.phase("apply"):
            adapted = _make_adapted(model, job)
        with meter.phase("collect"):
            result = eva_kernels.calibrate(
                adapted,
                job.batches,
                max_steps=job.max_forwards,
                on_not_converged="ignore",
                progress=False,
                seed=job.seed,
                **options,
            )
        meter.move_seconds("collect", "solve", result.seconds["fold"] + result.seconds["check"])
        for i in range(result.forwards):
            count_forward(job.batches[i % len(job.batches)], meter)
        with meter.phase("apply"):
            return result.apply(adapted)

    return start


_method = functools.partial(Method, reads_data=True)
METHODS = {
    "eva-peft": _method("EVA (PEFT)", _start_peft, "PEFT"),
    "eva": _method("EVA (this package)", _start_ours(), "this package"),
    "eva-sketch": _method(
        "EVA (this package, sketch)", _start_ours(method="sketch"), "this package"
    ),
    "eva-gram": _method("EVA (this package, exact)", _start_ours(method="gram"), "this package"),
    "eva-freeze": _method(
        "EVA (this package, freeze_converged)", _start_ours(freeze_converged=True), "this package"
    ),
}

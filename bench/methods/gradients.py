"""LoRA-GA, as implemented by PEFT and by the formula of the paper.

PEFT takes the right singular vectors of the mean gradient, unscaled, as A, and scales B by the
singular values; the authors take both as orthonormal rows times d_out^(1/4) / sqrt(gamma). PEFT's
change of the base weights is about a hundredth of the authors'.
"""

from __future__ import annotations

import functools
import warnings

import torch
from peft import LoraGAConfig, PeftModel, preprocess_loraga
from torch import nn

from ..meter import Meter
from ._job import Job, Method, count_forward, lora_layers, wrap_seeded

GAMMA = 16


def _collect_gradients(model: nn.Module, job: Job, meter: Meter) -> None:
    config = job.config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def train_step() -> None:
        for batch in job.batches:
            count_forward(batch, meter)
            job.loss(model, batch).backward()

    with meter.phase("collect"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(model, config, train_step)


def _start_peft(model: nn.Module, job: Job, meter: Meter) -> PeftModel:
    _collect_gradients(model, job, meter)
    ga = LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=GAMMA)
    with meter.phase("solve"):
        return wrap_seeded(
            model, job.config(init_lora_weights="lora_ga", lora_ga_config=ga), job.seed
        )


@torch.no_grad()
def _start_paper(model: nn.Module, job: Job, meter: Meter) -> PeftModel:
    _collect_gradients(model, job, meter)
    with meter.phase("apply"):
        adapted = wrap_seeded(model, job.config(init_lora_weights=False), job.seed)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with meter.phase("solve"), torch.random.fork_rng(devices=devices):
        torch.manual_seed(job.seed)
        for layer in lora_layers(adapted).values():
            base, r, scaling = layer.get_base_layer(), layer.r["default"], layer.scaling["default"]
            gradient = base._peft_loraga_grad.float()
            del base._peft_loraga_grad
            u, _, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
            factor = gradient.shape[0] ** 0.25 / GAMMA**0.5
            lora_a, lora_b = factor * v[:, :r].T, factor * u[:, r : 2 * r]
            layer.lora_A["default"].weight.copy_(lora_a)
            layer.lora_B["default"].weight.copy_(lora_b)
            base.weight.sub_((scaling * lora_b @ lora_a).to(base.weight.dtype))
    return adapted


_method = functools.partial(Method, reads_data=True)
METHODS = {
    "lora-ga": _method("LoRA-GA (PEFT)", _start_peft, "PEFT"),
    "lora-ga-paper": _method("LoRA-GA (paper)", _start_paper, "arXiv 2407.05000"),
}

"""Initialisers that use no data: random, or derived from the weights."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import nn

from ..meter import Meter
from ._job import Job, Method, lora_layers, wrap_seeded

PEFT = "PEFT"


def _start_wrapped(phase: str, **fields: Any) -> Any:
    def start(model: nn.Module, job: Job, meter: Meter) -> PeftModel:
        with meter.phase(phase):
            return wrap_seeded(model, job.config(**fields), job.seed)

    return start


def _start_orthonormal(model: nn.Module, job: Job, meter: Meter) -> PeftModel:
    with meter.phase("apply"):
        adapted = wrap_seeded(model, job.config(), job.seed)
        generator = torch.Generator().manual_seed(job.seed)
        for layer in lora_layers(adapted).values():
            weight = layer.lora_A["default"].weight
            rows = nn.init.orthogonal_(torch.empty(weight.shape), generator=generator)
            weight.data.copy_(rows)
        return adapted


def _start_adalora(model: nn.Module, job: Job, meter: Meter) -> PeftModel:
    config = job.config(
        AdaLoraConfig,
        init_r=round(1.5 * job.r),
        target_r=job.r,
        tinit=max(1, job.steps // 10),
        tfinal=max(1, job.steps // 3),
        deltaT=max(1, job.steps // 50),
        total_step=max(3, job.steps),
    )
    with meter.phase("apply"):
        return wrap_seeded(model, config, job.seed)


@torch.no_grad()
def _start_milora(model: nn.Module, job: Job, meter: Meter) -> PeftModel:
    with meter.phase("apply"):
        adapted = wrap_seeded(model, job.config(init_lora_weights=False), job.seed)
    with meter.phase("solve"):
        for layer in lora_layers(adapted).values():
            weight, scaling = layer.get_base_layer().weight, layer.scaling["default"]
            r = layer.r["default"]
            u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
            root = (s[-r:] / scaling).sqrt()
            lora_a, lora_b = root[:, None] * vh[-r:], u[:, -r:] * root
            layer.lora_A["default"].weight.copy_(lora_a)
            layer.lora_B["default"].weight.copy_(lora_b)
            weight.sub_((scaling * lora_b @ lora_a).to(weight.dtype))
    return adapted


METHODS = {
    "lora": Method("LoRA", _start_wrapped("apply"), PEFT),
    "orthonormal": Method("LoRA, orthonormal rows (control)", _start_orthonormal, "this harness"),
    "orthogonal": Method(
        "Orthogonal", _start_wrapped("apply", init_lora_weights="orthogonal"), PEFT
    ),
    "dora": Method("DoRA", _start_wrapped("apply", use_dora=True), PEFT),
    "adalora": Method("AdaLoRA", _start_adalora, PEFT),
    "pissa": Method("PiSSA", _start_wrapped("solve", init_lora_weights="pissa"), PEFT),
    "pissa-niter": Method(
        "PiSSA, 16 iterations", _start_wrapped("solve", init_lora_weights="pissa_niter_16"), PEFT
    ),
    "milora": Method("MiLoRA", _start_milora, "arXiv 2406.09044"),
    "olora": Method("OLoRA", _start_wrapped("solve", init_lora_weights="olora"), PEFT),
    "mica": Method("MiCA", _start_wrapped("solve", init_lora_weights="mica"), PEFT),
}

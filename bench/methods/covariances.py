"""CorDA: the full covariance of every layer's inputs, and the SVD of weights times covariance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora.config import CordaConfig
from torch import nn

from ..meter import Meter
from ._job import Job, Method, forward, wrap_seeded


def _start_corda(kind: Literal["ipm", "kpm"]) -> Callable[[nn.Module, Job, Meter], PeftModel]:
    def start(model: nn.Module, job: Job, meter: Meter) -> PeftModel:
        # needs the package attrs, which PEFT does not list as a dependency
        from peft.tuners.lora.corda import preprocess_corda

        config: Any = job.config(
            init_lora_weights="corda", corda_config=CordaConfig(corda_method=kind)
        )

        @torch.no_grad()
        def run_model() -> None:
            with meter.phase("collect"):
                for batch in job.batches:
                    for i in range(len(next(iter(batch.values())))):  # single samples only
                        forward(model, {k: v[i : i + 1] for k, v in batch.items()}, meter)

        training = model.training
        with meter.phase("solve"):
            preprocess_corda(model, config, run_model=run_model)
        model.train(training)  # preprocess_corda leaves it in eval mode
        with meter.phase("apply"):
            return wrap_seeded(model, config, job.seed)

    return start


METHODS = {
    f"corda-{kind}": Method(f"CorDA ({kind})", _start_corda(kind), "PEFT", True, True)
    for kind in ("ipm", "kpm")
}

"""The definition of an initialiser, and the input that all of them get."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..meter import Meter

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """The input of an initialiser, the same for all in a comparison.

    Attributes:
        targets: names of the layers to adapt, as PEFT matches them.
        batches: calibration data, mappings of tensors on the model's device.
        loss: ``f(model, batch)``, minimised by training.
        r: rank of every layer; methods that redistribute ranks keep their sum.
        rho, tau: of EVA.
        max_forwards: forward passes after which EVA is stopped, converged or not.
        steps: number of training steps that follow, for AdaLoRA.
        seed: of everything random.
        text: the batches are text, with padding given by an ``attention_mask``.
        modules_to_save: layers that are fully trained.
    """

    targets: Sequence[str]
    batches: Sequence[Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    r: int = 16
    rho: float = 2.0
    tau: float = 0.99
    max_forwards: int = 100
    steps: int = 100
    seed: int = 0
    text: bool = True
    modules_to_save: Sequence[str] = ()

    def config(self, kind: type[Any] = LoraConfig, **fields: Any) -> Any:
        """Return a PEFT config of type ``kind`` with the fields that all methods share."""
        if kind is LoraConfig:
            fields = {"r": self.r, **fields}
        return kind(
            lora_alpha=self.r,
            target_modules=list(self.targets),
            modules_to_save=list(self.modules_to_save) or None,
            **fields,
        )


def forward(model: nn.Module, batch: Batch, meter: Meter) -> Any:
    """Run a forward pass without labels, and count it."""
    count_forward(batch, meter)
    return model(**{key: value for key, value in batch.items() if key != "labels"})


def count_forward(batch: Batch, meter: Meter) -> None:
    """Count a forward pass, and its tokens (or samples if there are no token ids)."""
    meter.forwards += 1
    ids = batch.get("input_ids")
    meter.tokens += ids.numel() if ids is not None else len(next(iter(batch.values())))


def wrap_seeded(model: nn.Module, config: Any, seed: int, **options: Any) -> PeftModel:
    """Return ``get_peft_model(...)``, with random numbers from ``seed``."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice for users of an individual method
        torch.manual_seed(seed)
        return get_peft_model(model, config, **options)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and m.lora_A}


def rank_of(layer: LoraLayer) -> int:
    """Return the number of rows of ``lora_A``, which in AdaLoRA is a parameter, not a layer."""
    lora_a = layer.lora_A["default"]
    return len(getattr(lora_a, "weight", lora_a))


@dataclass(frozen=True)
class Method:
    """An initialiser.

    Attributes:
        label: for tables.
        start: ``f(base, job, meter)`` returns the adapted model; it measures the phases
            ``collect`` (passes over data), ``solve`` (decompositions) and ``apply``. If one call
            of PEFT covers two of them, both count as the first.
        source: library or paper that it follows.
        reads_data: it is data-driven.
        one_sample: it processes one sample at a time, whatever the batch size.
    """

    label: str
    start: Callable[[nn.Module, Job, Meter], PeftModel]
    source: str
    reads_data: bool = False
    one_sample: bool = False

"""Small models: with attention; with adapters, new, initialised (in part), loaded and trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import eva_kernels
from integration.conftest import QUIET, lora, make_mlp, perturb_b, run, vectors, wrapped

CONFIG = {"target_modules": ["0", "2"]}


def fresh(**fields: Any) -> PeftModel:
    return wrapped(make_mlp(), lora(**{**CONFIG, **fields}))


def eva_model(**fields: Any) -> PeftModel:
    return eva_kernels.initialize(fresh(**fields), vectors(), max_steps=3, **QUIET)


def loaded(model: PeftModel, folder: Any) -> PeftModel:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(make_mlp(), folder, is_trainable=True)


def trained(model: PeftModel) -> PeftModel:
    perturb_b(model)
    return model


def partly(model: PeftModel) -> PeftModel:
    rows = run(make_mlp(), vectors(), lora(**CONFIG)).state_dict()
    del rows["2"]
    with pytest.warns(eva_kernels.EvaWarning, match=r"is missing \(2\)"):
        eva_kernels.initialize_lora_eva_weights(model, eva_state_dict=rows, strict=False)
    return model


class Attentive(nn.Module):
    """PEFT adapts an ``nn.MultiheadAttention`` together with its output projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.lin = nn.Linear(20, 20)
        self.mha = nn.MultiheadAttention(20, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)[None]
        return self.mha(y, y, y)[0]

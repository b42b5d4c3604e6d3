"""Models, configs and batches for tests of faults, with a check that none of them has changed."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from integration.conftest import (
    lora,
    lora_layers,
    make_llama,
    make_mlp,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)

TEXTS = text_batches(4)
MLP = {"target_modules": ["0", "2"]}


class Setup:
    """Models in mixed modes with hooks, configs and batches, which no fault may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.llama = self._in_mixed_modes(make_llama())
        self.mlp = self._in_mixed_modes(make_mlp())
        self.peft = self._in_mixed_modes(wrapped(make_mlp(), lora(**MLP)))
        self.config, self.mlp_config = lora(), lora(**MLP)
        self.texts, self.data = copy.deepcopy(TEXTS), vectors()
        self.watched: list[nn.Module] = [self.llama, self.mlp, self.peft]
        self.snapshot()

    @staticmethod
    def _in_mixed_modes(model: nn.Module) -> Any:
        model.train()
        next(iter(model.children())).eval()
        model.register_forward_hook(lambda *_: None)
        return model

    def add_model(self, model: nn.Module) -> Any:
        """Watch a further model, which the test of a fault has made."""
        self.watched.append(self._in_mixed_modes(model))
        self.snapshot()
        return model

    def snapshot(self) -> None:
        """Record what has to be the same afterwards."""
        self.states = [state_of(m) for m in self.watched]
        self.before = self.describe()

    def describe(self) -> dict[str, Any]:
        return {
            "models": [self._describe_model(model) for model in self.watched],
            "configs": [repr(self.config), repr(self.mlp_config)],
            "texts": [sorted(b) for b in self.texts],
            "random": (torch.get_rng_state().tolist(), random.getstate()),
            "numpy": np.random.get_state()[1].tolist(),
            "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "dtype": torch.get_default_dtype(),
        }

    @staticmethod
    def _describe_model(model: nn.Module) -> dict[str, Any]:
        return {
            "kinds": [type(m).__name__ for m in model.modules()],
            "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
            "training": [m.training for m in model.modules()],
            "flags": [(p.requires_grad, p.grad is None) for p in model.parameters()],
            "objects": [id(p) for p in model.parameters()],
            "cache": getattr(getattr(model, "config", None), "use_cache", None),
            "adapters": [(n, m.disable_adapters) for n, m in lora_layers(model).items()],
            "names": ("eva_result" in vars(model), "peft_config" in vars(model)),
        }

    def check(self) -> None:
        for state, model in zip(self.states, self.watched, strict=True):
            assert same_state(state, state_of(model))
        now = self.describe()
        for key, value in self.before.items():
            assert now[key] == value, key
        for original, current in zip(TEXTS, self.texts, strict=True):
            assert all(torch.equal(original[k], current[k]) for k in original)
        assert all(torch.equal(a, b) for a, b in zip(vectors(), self.data, strict=True))
        assert not list(self.folder.glob("*.tmp*"))

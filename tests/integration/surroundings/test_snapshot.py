"""A snapshot restores the structure of a model by reference and in order, but no values."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from eva_peft.surroundings.snapshot import ModelSnapshot, restored, restored_on_failure


class CustomDict(UserDict):  # type: ignore[type-arg]
    """A container with its own bookkeeping."""


def make_model() -> Any:
    model: Any = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.Linear(2, 2)))
    model.register_buffer("mean", torch.zeros(2))
    model.config = SimpleNamespace(layers=2, names=["a", "b"])
    model.b.generation_config = SimpleNamespace(length=3)
    model.a.config = {"no": "object"}
    model.ranks, model.order = {"a": 1, "b": 2}, OrderedDict(a=1, b=2)
    model.listed, model.known = [1, 2, 3], {1, 2}
    model.counts, model.custom = defaultdict(int, x=1), CustomDict(x=1)
    return model


def describe(model: Any) -> list[Any]:
    own = [[(name, id(value)) for name, value in vars(m).items()] for m in (model, model.a)]
    parts = [list(part.items()) for part in (model._modules, model.a._parameters, model.ranks)]
    configs = [list(vars(c).items()) for c in (model.config, model.b.generation_config)]
    rest = [list(model.order.items()), list(model.listed), set(model.known), dict(model.a.config)]
    return [own, parts, configs, rest, [p.requires_grad for p in (*model.parameters(), model.mean)]]


def change(model: Any) -> None:
    before = model.b
    del model.b, model.ranks["a"], model.order["a"], model.a.bias
    model.b, model.late = before, 1  # in another order
    model.ranks["a"], model.order["a"] = 1, 1
    model.listed.reverse()
    model.listed += [4]
    model.known |= {3}
    model.known.discard(1)
    model.config.layers, model.config.late, before.generation_config.length = 1, 1, 5
    model.a.config["no"] = "more"
    model.a.weight.requires_grad_(False)
    model.mean.requires_grad_(True)
    model.counts["y"], model.custom["y"] = 2, 2


def test_all_changes_of_structure_are_restored() -> None:
    model = make_model()
    before, again = describe(model), ModelSnapshot(model)
    with restored(model):
        change(model)
        model.b.weight.data.fill_(7)
        assert describe(model) != before
    assert describe(model) == before
    assert model.b.weight.eq(7).all()
    # containers of other classes are not restored
    assert (dict(model.counts), dict(model.custom)) == ({"x": 1, "y": 2}, {"x": 1, "y": 2})
    for _ in range(2):
        change(model)
        again.restore()
        assert describe(model) == before


def test_restored_on_failure_restores_only_after_a_failure() -> None:
    model = make_model()
    before = describe(model)
    with suppress(KeyboardInterrupt), restored_on_failure(model):
        change(model)
        raise KeyboardInterrupt
    assert describe(model) == before
    with restored_on_failure(model):
        change(model)
    assert describe(model) != before


def test_unchanged_flags_are_not_set() -> None:
    """PyTorch refuses to set flags of parameters created in inference mode."""
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    with restored(model):
        del model.bias
    assert list(model._parameters) == ["weight", "bias"]

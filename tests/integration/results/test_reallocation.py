"""``EvaResult.reallocated``: new ranks from the same spectra, unchanged scaling, valid numbers."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import eva_kernels
from eva_kernels import EvaError, EvaResult, EvaTypeError, EvaValueError
from eva_peft.model.targets import Target
from eva_peft.passes.ranks import Budget
from integration.conftest import (
    QUIET,
    Clash,
    lora,
    lora_layers,
    make_llama,
    make_mlp,
    output_of,
    perturb_b,
    run,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)
from integration.model.mixtral import FUSED, make_mixtral


def scalings(model: nn.Module) -> dict[str, float]:
    return {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}


FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"lin": 6, "^head": 5}, "alpha_pattern": {"^head": 3, "lin": 5}},
    "one alpha": {"rank_pattern": {"lin": 6}},
    "one rank": {"alpha_pattern": {"head": 3}},
    "one scaling": {"rank_pattern": {"head": 6}, "alpha_pattern": {"head": 18}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"lin": 6}},
    "overlapping": {"rank_pattern": {"lin": 6}, "alpha_pattern": {r"^sub\.lin": 3, "l.*": 5}},
}


@pytest.mark.parametrize("r", [1, 3, 4])
@pytest.mark.parametrize("case", FIELDS)
def test_reallocation_keeps_the_scaling(case: str, r: int, tmp_path: Path) -> None:
    x, config = vectors(4, features=16), lora(lora_alpha=12, **FIELDS[case])
    result = run(Clash(False), iter(x), config, method="gram")
    root = math.sqrt if config.use_rslora else float
    expected = {n: result.alphas[n] / root(result.base_ranks[n]) for n in result.ranks}
    assert (len(set(expected.values())) > 1) == (case not in ("plain", "rslora", "one scaling"))
    assert result.reallocated().ranks == result.ranks
    if case == "plain":  # no layer needs its own alpha
        assert result.reallocated(r=r).metadata["lora_config"]["alpha_pattern"] == {}
    metadata = copy.deepcopy(result.metadata)
    models: dict[str, nn.Module] = {"base": Clash(False), "adapters": wrapped(Clash(False), config)}
    for way, model in models.items():
        done = result.apply(model, r=r)
        assert sum(m.r["default"] for m in lora_layers(done).values()) == 4 * r
        for name, scaling in scalings(done).items():
            assert scaling == pytest.approx(expected[name], rel=1e-12), (way, name)
        # another reallocation and a saved adapter have the same scaling
        assert scalings(done.eva_result.apply(Clash(False))) == pytest.approx(scalings(done))
        perturb_b(done)
        done.save_pretrained(tmp_path / way)
        again = PeftModel.from_pretrained(Clash(False), tmp_path / way)
        assert scalings(again) == pytest.approx(scalings(done))
        assert output_of(again, x[0]).equal(output_of(done, x[0]))
    assert result.metadata == metadata


class WithEmbedding(nn.Module):
    """A layer whose input EVA reads, an embedding, and a layer that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lin, self.spare = nn.Embedding(9, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin(self.embed(ids))


@pytest.mark.parametrize(
    ("embed", "before"),
    [
        ({"alpha_pattern": {"embed": 3}}, 3 / 4),
        ({"rank_pattern": {"embed": 6}}, 12 / 6),
        ({"rank_pattern": {"embed": 6}, "alpha_pattern": {"embed": 3}}, 3 / 6),
        ({"rank_pattern": {"embed": 6}, "alpha_pattern": {".*bed": 3}}, 3 / 6),
        ({"rank_pattern": {".*bed": 6}, "alpha_pattern": {"embed": 3}}, 3 / 6),
        ({"rank_pattern": {"em[b]ed": 6}, "alpha_pattern": {"em[b]ed": 3}}, 3 / 6),
        ({"rank_pattern": {"em.*": 6}, "alpha_pattern": {"embed": 3, "em.*": 5}}, 3 / 6),
    ],
)
@pytest.mark.filterwarnings("ignore:.* default initialisation:eva_peft.errors.EvaWarning")
def test_layers_without_components_keep_their_scaling(
    embed: dict[str, dict[str, int]], before: float
) -> None:
    names = ["embed", "lin", "spare"]
    patterns = {"rank_pattern": {"spare": 6}, "alpha_pattern": {"spare": 5}}
    for pattern, values in embed.items():
        patterns[pattern] |= values
    config = lora(lora_alpha=12, target_modules=names, **patterns)
    result = run(WithEmbedding(), [torch.arange(9)], config, max_steps=2)
    done = result.apply(WithEmbedding(), r=2).base_model.model
    layers = {name: done.get_submodule(name) for name in names}
    assert {name: layer.r["default"] for name, layer in layers.items()} == dict.fromkeys(names, 2)
    scaling = {name: layer.scaling["default"] for name, layer in layers.items()}
    assert scaling == pytest.approx({"embed": before, "lin": 12 / 4, "spare": 5 / 6})


def test_alpha_is_kept_without_adjust_scaling_factors() -> None:
    config = lora(adjust_scaling_factors=False)
    result = run(Clash(False), vectors(3, features=16), config, max_steps=3)
    for model in (Clash(False), wrapped(Clash(False), config)):
        for layer in lora_layers(result.apply(model, r=2)).values():
            assert layer.lora_alpha["default"] == 8
            assert layer.scaling["default"] == 8 / layer.r["default"]


# PEFT searches the pattern among modules only and warns, but applies it to the parameter
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any:RuntimeWarning")
def test_experts_keep_their_scaling_factor() -> None:
    config = lora(rank_pattern={"experts.down_proj": 6}, **FUSED)
    result = run(make_mixtral(), text_batches(2), config, max_steps=2)
    before = scalings(result.apply(make_mixtral()))
    assert len(set(before.values())) == 2
    assert scalings(result.apply(make_mixtral(), r=2)) == pytest.approx(before)


@pytest.mark.parametrize(
    ("allocation", "error", "message"),
    [
        ({"r": 0}, EvaValueError, "^r=0 must be at least 1"),
        ({"r": -2}, EvaValueError, "^r=-2 must be at least 1"),
        ({"r": 2.5}, EvaTypeError, "^r=2.5 must be a whole number"),
        ({"r": True}, EvaTypeError, "^r=True must be a whole number"),
        ({"r": "4"}, EvaTypeError, "^r='4' must be a whole number"),
        ({"rho": 0.5}, EvaValueError, "^rho=0.5 must be at least 1"),
        ({"rho": float("nan")}, EvaValueError, "^rho=nan must be at least 1"),
        ({"rho": "2"}, EvaTypeError, "^rho='2' must be a number"),
        ({"budget": "param"}, EvaValueError, "^budget='param' is unknown.*'params'"),
        ({"min_rank": -1}, EvaValueError, "^min_rank=-1 must be at least 0"),
        ({"min_rank": 1.5}, EvaTypeError, "^min_rank=1.5 must be a whole number"),
    ],
)
def test_invalid_allocations_are_errors(
    allocation: dict[str, Any], error: type[Exception], message: str, llama_result: EvaResult
) -> None:
    with pytest.raises(error, match=message) as caught:
        llama_result.reallocated(**allocation)
    assert isinstance(caught.value, EvaError)
    model = make_llama()
    with pytest.raises(error, match=message):
        llama_result.apply(model, **allocation)
    assert not lora_layers(model)


@pytest.mark.parametrize("prepared", [True, False])
def test_unknown_options_are_named(prepared: bool, llama_result: EvaResult) -> None:
    model = wrapped(make_llama(), lora()) if prepared else make_llama()
    before = state_of(model)
    with pytest.raises(EvaTypeError, match=r"'foo'; the options are r, rho, budget, min_rank$"):
        llama_result.apply(model, r=2, foo=1)
    assert same_state(before, state_of(model))


@pytest.mark.parametrize("prepared", [True, False])
def test_numbers_of_numpy_and_torch_in_a_config_are_accepted(
    prepared: bool, tmp_path: Path
) -> None:
    config = lora(
        r=np.int64(4),
        rho=np.float32(2),
        lora_alpha=np.float32(8),
        rank_pattern={"2": np.int32(3)},
        alpha_pattern={"2": torch.tensor(5)},
        target_modules=["0", "2"],
    )
    base = make_mlp()
    model = wrapped(base, config) if prepared else base
    done = eva_kernels.initialize(
        model, vectors(), None if prepared else config, max_steps=3, **QUIET
    )
    result = done.eva_result
    result.save(tmp_path / "eva.safetensors")
    again = EvaResult.load(tmp_path / "eva.safetensors")
    assert again.base_ranks == {"0": 4, "2": 3}
    assert again.alphas == {"0": 8, "2": 5}
    smaller = again.reallocated(r=np.int64(2))
    json.dumps([smaller.base_ranks, smaller.alphas, smaller.metadata])
    assert scalings(smaller.apply(make_mlp())) == pytest.approx({"0": 2, "2": 5 / 3})
    if not prepared:
        done.save_pretrained(tmp_path / "adapter")
        assert isinstance(config.r, np.int64)  # the caller's config is not modified


@pytest.mark.parametrize("budget", ["rank", "params"])
def test_layers_of_equal_size_get_equal_ranks_for_both_budgets(budget: str) -> None:
    targets = [Target(name, nn.Identity(), 16, 8, 4, 8.0) for name in "ab"]
    ratios = [torch.linspace(0.5, 0.1, 8), torch.linspace(0.4, 0.0, 8)]
    assert Budget(targets, budget, 0).ranks_for(ratios) == [5, 3]


def test_parameter_without_variance_keeps_rank_one() -> None:
    """PEFT could not remove the adapter of a parameter."""
    targets = [Target(name, nn.Identity(), 16, 8, 4, 8.0, owner=name) for name in "ab"]
    budget, ratios = Budget(targets, "rank", 0), torch.linspace(0.5, 0.1, 8)
    assert budget.ranks_for([torch.zeros(8), ratios])[0] == 1
    assert budget.ranks_for([1e-6 * ratios, ratios]) == [1, 7]


def test_min_rank_is_rounded_up_to_the_groups() -> None:
    targets = [Target(name, nn.Identity(), 16, 8, 4, 8.0, rank_multiple=2) for name in "ab"]
    ratios = torch.linspace(0.5, 0.1, 8)
    found = [
        Budget(targets, "rank", min_rank).ranks_for([ratios, 1e-6 * ratios])
        for min_rank in (0, 1, 3)
    ]
    assert found == [[8, 0], [6, 2], [4, 4]]

"""Adapters written by EVA: reload, scaling, dtypes, other adapters."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.other import get_pattern_key
from torch import nn

import eva_kernels
from eva_peft import _peft_compat
from eva_peft._peft_compat import MAX_PATTERN_KEYS
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
    vectors,
    wrapped,
)


def reloaded(model: PeftModel, base: nn.Module, folder: Any, adapter: str = "default") -> nn.Module:
    model.save_pretrained(folder)
    path = folder if adapter == "default" else folder / adapter
    return PeftModel.from_pretrained(base, path).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"lin": 3, "sub.other": 5}, "alpha_pattern": {"sub.other": 3}},
        {"target_modules": ["lin", "other"], "lora_dropout": 0.1},
        {"target_modules": r"(sub\.)?(lin|other|head)", "exclude_modules": ["head"]},
        {"target_modules": ["lin", "other"], "modules_to_save": ["head"]},
        pytest.param(
            {"init_lora_weights": True, "lora_bias": True},
            marks=pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),
        ),
        {"whiten": True},
    ],
    ids=[
        "plain",
        "rslora",
        "dora",
        "patterns",
        "suffixes",
        "regex",
        "modules_to_save",
        "bias",
        "whiten",
    ],
)
@pytest.mark.parametrize("dead", [True, False])
def test_saved_adapters_reload_exactly(fields: dict[str, Any], dead: bool, tmp_path: Any) -> None:
    x = vectors(6, features=16)
    config = lora(tau=1.0, **copy.deepcopy(fields))
    before = output_of(Clash(dead), x[0])
    model = eva_kernels.initialize(Clash(dead), iter(x), config, method="gram", **QUIET)
    torch.testing.assert_close(output_of(model, x[0]), before, rtol=0, atol=1e-6)
    ranks = model.eva_result.ranks
    # PEFT confuses the ranks of names with equal ends, notably rank 0
    assert (ranks["sub.lin"] == 0) == dead
    assert len(set(ranks.values())) > 1
    layers = lora_layers(model)
    assert ("sub.lin" in layers) != dead
    assert sum(layer.r["default"] for layer in layers.values()) == sum(ranks.values())
    if dead:
        assert type(model.base_model.model.sub["lin"]) is nn.Linear
        assert "sub.lin" not in model.targeted_module_names
    perturb_b(model.eval())
    expected = output_of(model, x[0])
    assert not torch.allclose(expected, before, atol=1e-3)
    again = reloaded(model, Clash(dead), tmp_path)
    assert torch.equal(output_of(again, x[0]), expected)
    assert {n: m.r["default"] for n, m in lora_layers(again).items()} == {
        n: m.r["default"] for n, m in layers.items()
    }
    assert {n: m.scaling["default"] for n, m in lora_layers(again).items()} == {
        n: m.scaling["default"] for n, m in layers.items()
    }


def test_llama_reloads_exactly(initialized: PeftModel, texts: list[Any], tmp_path: Any) -> None:
    perturb_b(initialized)
    expected = output_of(initialized, texts[0])
    again = reloaded(initialized, make_llama(), tmp_path)
    assert torch.equal(output_of(again, texts[0]), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(output_of(merged, texts[0]), expected, rtol=1e-3, atol=1e-5)


def test_rank_pattern_of_the_user_sets_the_budget() -> None:
    config = lora(rank_pattern={"lin": 3, "sub.other": 5}, alpha_pattern={"sub.other": 3})
    result = run(Clash(False), vectors(3, features=16), config)
    # "lin" is a suffix pattern in PEFT: it matches sub.lin as well
    assert result.base_ranks == {"lin": 3, "sub.lin": 3, "sub.other": 5, "head": 4}
    assert sum(result.ranks.values()) == 15
    assert result.alphas["sub.other"] == 3
    assert result.ranks["sub.other"] <= 10
    assert result.ranks["lin"] <= 6


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("prepared", ["no", "alike", "otherwise"])
def test_scaling_of_changed_ranks(rslora: bool, adjust: bool, prepared: str) -> None:
    fields: dict[str, Any] = {"use_rslora": rslora, "alpha_pattern": {"sub.other": 3}}
    config = lora(adjust_scaling_factors=adjust, **fields)
    model: nn.Module = Clash()
    x = vectors(4, features=16)
    if prepared == "otherwise":  # the given config sets the options of EVA
        model = wrapped(model, lora(adjust_scaling_factors=not adjust, **fields))
    elif prepared == "alike":
        model = wrapped(model, config)
    given = None if prepared == "alike" else config
    model = eva_kernels.initialize(model, x, given, max_steps=4, **QUIET)
    layers = lora_layers(model)
    assert any(layer.r["default"] != 4 for layer in layers.values())
    for name, layer in layers.items():
        alpha = 3 if name == "sub.other" else 8
        root = math.sqrt if rslora else float
        rank = 4 if adjust else layer.r["default"]
        assert layer.scaling["default"] == pytest.approx(alpha / root(rank), rel=1e-12)


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("way", ["adapters", "base", "plain"])
def test_adapter_dtype_is_that_of_plain_lora(meta: bool, way: str, texts: list[Any]) -> None:
    base = make_llama(torch.bfloat16)
    if way == "plain":
        model = wrapped(base, lora(init_lora_weights=True), low_cpu_mem_usage=meta)
        done = eva_kernels.initialize(model, texts, lora(), max_steps=2, **QUIET)
    elif way == "adapters":
        model = wrapped(base, lora(), low_cpu_mem_usage=meta)
        done = eva_kernels.initialize(model, texts, max_steps=2, **QUIET)
    else:
        done = eva_kernels.initialize(base, texts, lora(), max_steps=2, **QUIET)
    assert len({layer.r["default"] for layer in lora_layers(done).values()}) > 1
    for layer in lora_layers(done).values():
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert layer.lora_B["default"].weight.dtype == torch.float32
        assert layer.get_base_layer().weight.dtype == torch.bfloat16
    half = wrapped(make_llama(torch.bfloat16), lora(), autocast_adapter_dtype=False)
    done = eva_kernels.initialize(half, texts, max_steps=2, **QUIET)
    for layer in lora_layers(done).values():
        assert layer.lora_A["default"].weight.dtype == torch.bfloat16


def test_other_adapter_is_unchanged(texts: list[Any]) -> None:
    config = lora(r=3, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    model = wrapped(make_llama(), config, adapter_name="other")
    model.add_adapter("mine", lora(target_modules=["q_proj", "v_proj"]))
    kept = {n: v for n, v in state_of(model).items() if ".other." in n}
    saved = copy.deepcopy(model.peft_config["other"])
    model.set_adapter("other")
    expected = output_of(model, texts[0])
    flags = {n: p.requires_grad for n, p in model.named_parameters() if ".other." in n}
    model = eva_kernels.initialize(
        model, texts, adapter_name="mine", max_steps=4, method="gram", **QUIET
    )
    assert model.eva_result.ranks.keys() == {
        f"model.layers.{i}.self_attn.{k}_proj" for i in (0, 1) for k in "qv"
    }
    assert sum(model.eva_result.ranks.values()) == 16
    assert same_state(kept, {n: v for n, v in state_of(model).items() if ".other." in n})
    assert model.peft_config["other"] == saved
    assert model.active_adapters == ["other"]
    assert torch.equal(output_of(model, texts[0]), expected)
    after = {n: p.requires_grad for n, p in model.named_parameters() if ".other." in n}
    assert after == flags
    layers = lora_layers(model, "mine")
    assert {n: m.r["mine"] for n, m in layers.items()} == {
        n: r for n, r in model.eva_result.ranks.items() if r
    }


def test_rank_zero_keeps_the_other_adapter_of_a_layer(tmp_path: Any) -> None:
    x = vectors(4, features=16)
    model = wrapped(Clash(), lora(r=2, init_lora_weights=False, target_modules=["lin"]))
    expected = output_of(model, x[0])
    model.add_adapter("mine", lora())
    model = eva_kernels.initialize(model, x, adapter_name="mine", max_steps=4, **QUIET)
    assert model.eva_result.ranks["sub.lin"] == 0
    assert set(lora_layers(model)) == {"lin", "sub.lin"}
    assert set(lora_layers(model, "mine")) == {"lin", "sub.other", "head"}
    model.set_adapter("default")
    assert torch.equal(output_of(model, x[0]), expected)
    model.set_adapter("mine")
    perturb_b(model, "mine")
    expected = output_of(model, x[0])
    again = reloaded(model, Clash(), tmp_path, "mine")
    assert torch.equal(output_of(again, x[0]), expected)


def test_whitening_is_per_layer_and_not_in_place(texts: list[Any]) -> None:
    options = {"method": "gram", "max_steps": 4}
    shared = run(make_llama(), texts, lora(whiten=True), **options)
    plain = run(make_llama(), texts, lora(), **options)
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert any(set(names) <= set(group) for group in shared.shared_inputs)
    alone = {
        n: run(make_llama(), texts, lora(whiten=True, target_modules=[n]), **options) for n in names
    }
    state = shared.state_dict()
    for name in names:
        rank = shared.ranks[name]
        assert rank > 0
        values = shared.singular_values[name][:rank]
        torch.testing.assert_close(state[name].norm(dim=1), values.rsqrt())
        other = alone[name].state_dict()[name]
        both = min(rank, len(other))
        torch.testing.assert_close(state[name][:both], other[:both], rtol=1e-3, atol=1e-5)
    for name, rows in plain.components.items():
        torch.testing.assert_close(shared.components[name], rows)  # not whitened in place
    again = shared.state_dict()
    assert all(torch.equal(again[n], rows) for n, rows in state.items())


def test_dora_and_modules_to_save_are_initialised(texts: list[Any]) -> None:
    config = lora(use_dora=True, modules_to_save=["lm_head"], target_modules=["q_proj", "up_proj"])
    base = make_llama()
    before = output_of(base, texts[0])
    model = eva_kernels.initialize(base, texts, config, max_steps=4, **QUIET)
    torch.testing.assert_close(output_of(model, texts[0]), before, rtol=1e-5, atol=1e-5)
    for layer in lora_layers(model).values():
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert magnitude.shape == (layer.out_features,)
        torch.testing.assert_close(magnitude, layer.get_base_layer().weight.norm(dim=1))
        assert magnitude.requires_grad
    head = model.base_model.model.lm_head.modules_to_save["default"]
    assert head.weight.requires_grad
    assert "lm_head" not in model.eva_result.ranks


def test_modules_to_save_are_disabled_during_the_pass(mlp: nn.Module, data: list[Any]) -> None:
    config = lora(target_modules=["2"], modules_to_save=["0"])
    expected = run(copy.deepcopy(mlp), iter(data), config, method="gram")
    model = wrapped(mlp, config)
    with torch.no_grad():
        model.base_model.model[0].modules_to_save["default"].weight.mul_(-3)
    found = run(model, iter(data), method="gram")
    torch.testing.assert_close(found.components["2"], expected.components["2"])


def test_trained_adapters_are_disabled_during_the_pass(
    initialized: PeftModel, texts: list[Any], llama_result: Any
) -> None:
    perturb_b(initialized)
    result = run(initialized, iter(texts), lora(tau=1.0), method="gram")
    for name, rows in result.components.items():
        assert torch.equal(rows, llama_result.components[name])


def test_lora_bias_is_set_to_zero(data: list[Any]) -> None:
    config = lora(lora_bias=True, init_lora_weights=False, target_modules=["0", "2"])
    model = wrapped(make_mlp(), config)
    with model.disable_adapter():
        expected = output_of(model, data[0])
    model = eva_kernels.initialize(model, data, allow_any_init=True, max_steps=3, **QUIET)
    assert torch.equal(output_of(model, data[0]), expected)


def test_parameters_of_unchanged_rank_are_the_same_objects(data: list[Any]) -> None:
    model = wrapped(make_mlp(), lora(rho=1.0, target_modules=["0", "2"]))
    before = {id(p) for p in model.parameters() if p.requires_grad}
    model = eva_kernels.initialize(model, data, max_steps=3, **QUIET)
    assert {id(p) for p in model.parameters() if p.requires_grad} == before


def test_resized_layers_keep_flags_and_modes() -> None:
    x = vectors(3, features=16)
    model = wrapped(Clash(), lora(lora_dropout=0.5))
    model.add_adapter("other", lora(init_lora_weights=True))
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    model = eva_kernels.initialize(model, x, max_steps=3, **QUIET)
    assert len({layer.r["default"] for layer in lora_layers(model).values()}) > 1
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_B" in name), name
    assert not any(m.training for m in model.modules())
    perturb_b(model)
    assert torch.equal(output_of(model, x[0]), output_of(model, x[0]))


def test_layer_names_that_look_like_wrapper_prefixes(tmp_path: Any) -> None:
    class Outer(nn.Module):
        """``module.lin`` beside ``lin``, as in a wrapper's prefix."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.module = nn.ModuleDict({"lin": nn.Linear(16, 16)})
            self.lin = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(torch.tanh(self.module["lin"](x)) * 0.1)

    x = vectors(4, features=16)
    config = lora(target_modules=["lin"], rank_pattern={"module.lin": 6})
    model = eva_kernels.initialize(Outer(), iter(x), config, method="gram", **QUIET)
    assert list(model.eva_result.ranks) == ["module.lin", "lin"]
    assert model.eva_result.base_ranks == {"module.lin": 6, "lin": 4}
    ranks = {n: m.r["default"] for n, m in lora_layers(model).items()}
    assert ranks == model.eva_result.ranks
    perturb_b(model)
    expected = output_of(model, x[0])
    assert torch.equal(output_of(reloaded(model, Outer(), tmp_path), x[0]), expected)


def test_wrapping_preserves_the_random_state(llama_result: Any) -> None:
    model = make_llama()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    llama_result.apply(model)
    assert torch.equal(torch.rand(3), expected)


def test_many_ranks_need_few_pattern_keys(tmp_path: Any) -> None:
    """PEFT tries every key on every layer, which takes minutes for a thousand keys."""
    count = 2 * MAX_PATTERN_KEYS
    model = wrapped(make_chain(count), lora(r=4, target_modules="all-linear"))
    rows = {str(i): torch.eye(1 + i % 6, 8) for i in range(count)}
    eva_kernels.initialize_lora_eva_weights(model, eva_state_dict=rows)
    pattern = model.peft_config["default"].rank_pattern
    assert sorted(pattern.values()) == [1, 2, 3, 5, 6]
    perturb_b(model)
    again = reloaded(model, make_chain(count), tmp_path)
    ranks = {name: layer.r["default"] for name, layer in lora_layers(again).items()}
    assert ranks == {name: len(row) for name, row in rows.items()}
    assert same_state(state_of(model), state_of(again))


def make_chain(count: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(count)))


@pytest.mark.parametrize("most", [0, MAX_PATTERN_KEYS])
def test_patterns_match_as_in_peft(most: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(_peft_compat, "MAX_PATTERN_KEYS", most)
    names = ["a.lin", "b.lin", "lin", "a.lin.0", "a-lin", "a+.lin", "x.a.lin", "a.lin_2"]
    values = {name: i // 2 for i, name in enumerate(names)}
    pattern = _peft_compat.pattern_from_values(values, default=1)
    assert len(pattern) == (3 if most == 0 else 6)
    loose = {"lin": 7, r"a\\.lin": 8, "^b": 9, r".*\d": 10}
    for tried in (pattern, {**loose, **pattern}, {**pattern, **loose}, loose):
        for name in names:
            theirs = tried.get(get_pattern_key(list(tried), name), 1)
            assert _peft_compat.pattern_value(tried, name, 1) == theirs, (tried, name)
    assert all(_peft_compat.pattern_value(pattern, n, 1) == v for n, v in values.items())

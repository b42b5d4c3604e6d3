"""``initialize``: every form of model and config, every kind of module, output unchanged."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

import eva_kernels
from eva_kernels import EvaTypeError
from eva_peft import _peft_compat
from eva_peft.model.targets import find_targets
from integration.conftest import (
    QUIET,
    Clash,
    hooks_of,
    layer_inputs,
    lora,
    lora_layers,
    lost,
    make_bert,
    make_gpt2,
    make_llama,
    make_mlp,
    output_of,
    perturb_b,
    run,
    text_batches,
    vectors,
    wrapped,
)
from integration.model.mixtral import make_mixtral


def make_argument(how: str, base: nn.Module) -> tuple[nn.Module, LoraConfig | None]:
    if how == "config":
        return base, lora()
    if how == "no config":
        return base, None
    return wrapped(base, lora(), low_cpu_mem_usage=how == "meta"), None


@pytest.mark.parametrize("how", ["adapters", "meta", "config", "no config"])
def test_adapters_are_written_and_the_output_unchanged(
    how: str, llama: nn.Module, texts: list[Any]
) -> None:
    before = output_of(llama, texts[0])
    model, config = make_argument(how, llama)
    done = eva_kernels.initialize(model, texts, config, max_steps=8, **QUIET)
    assert isinstance(done, PeftModel)
    assert isinstance(done.eva_result, eva_kernels.EvaResult)
    r = 16 if how == "no config" else 4
    layers = lora_layers(done)
    assert sum(layer.r["default"] for layer in layers.values()) == 14 * r
    assert sum(done.eva_result.ranks.values()) == 14 * r
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.device.type == "cpu"
        assert a.dtype == b.dtype == torch.float32
        assert a.shape == (done.eva_result.ranks[name], layer.in_features)
        torch.testing.assert_close(a @ a.mT, torch.eye(len(a)), atol=2e-6, rtol=0)
        assert not b.any()
        assert a.requires_grad
        assert b.requires_grad
    assert torch.equal(output_of(done, texts[0]), before)
    assert hooks_of(done) == 0
    done(**texts[0], labels=texts[0]["input_ids"]).loss.backward()
    assert all(m.lora_B["default"].weight.grad.any() for m in layers.values())


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_other_architectures_have_exact_rows(make: Any) -> None:
    model, batches = make(), text_batches(4)
    config = lora(tau=1.0, fan_in_fan_out=make is make_gpt2)
    before = output_of(model, batches[0])
    done = eva_kernels.initialize(model, iter(batches), config, method="gram", **QUIET)
    result = done.eva_result
    assert torch.equal(output_of(done, batches[0]), before)
    inputs = layer_inputs(make(), batches, list(result.ranks))
    for name, rows in result.state_dict().items():
        assert len(rows) == 0 or lost(rows, inputs[name]) < 1e-6, name
    assert sum(result.ranks.values()) == 4 * len(result.ranks)
    kinds = {name.rsplit(".", 1)[-1] for name in result.ranks}
    assert kinds >= ({"c_attn", "c_fc", "c_proj"} if make is make_gpt2 else {"query", "dense"})


def test_plain_module_and_tensor_batches_have_exact_rows(mlp: nn.Module, data: list[Any]) -> None:
    done = eva_kernels.initialize(
        mlp, iter(data), lora(target_modules=["0", "2"], tau=1.0), method="gram", **QUIET
    )
    inputs = layer_inputs(done, data, ["base_model.model.0", "base_model.model.2"])
    for name, layer in lora_layers(done).items():
        rows = layer.lora_A["default"].weight.detach()
        assert lost(rows, inputs[f"base_model.model.{name}"]) < 1e-7


def test_all_linear_with_names_that_are_suffixes_of_others(tmp_path: Any) -> None:
    """The target "0" of the outer container does not select "1.layers.0"."""

    def make() -> nn.Sequential:
        torch.manual_seed(7)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.Linear(20, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 4))

    data = [x.reshape(5, 8, 20) for x in vectors(4)]
    with pytest.warns(eva_kernels.EvaWarning, match=r"never called .*1\.layers\.0\.self_attn"):
        done = eva_kernels.initialize(make().eval(), data, lora(), max_steps=4, **QUIET)
    called = {"0", "2", *(f"1.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2))}
    assert set(done.eva_result.ranks) == called
    perturb_b(done)
    done.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make().eval(), tmp_path)
    assert torch.equal(output_of(again, data[0]), output_of(done, data[0]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="DataParallel moves the model to the GPU")
def test_data_parallel_is_unwrapped(mlp: nn.Module, data: list[Any], tmp_path: Any) -> None:
    config = lora(target_modules=["0", "2"])
    plain = run(copy.deepcopy(mlp), data, config, max_steps=3)
    for model, given in (
        (nn.DataParallel(copy.deepcopy(mlp)), config),
        (nn.DataParallel(wrapped(copy.deepcopy(mlp), config)), None),
    ):
        done = eva_kernels.initialize(model, data, given, max_steps=3, **QUIET)
        assert isinstance(done, PeftModel)
        assert done.eva_result.ranks == plain.ranks
        perturb_b(done)
        done.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path)
        assert torch.equal(output_of(again, data[0]), output_of(done, data[0]))


def test_compiled_wrappers_are_unwrapped(mlp: nn.Module, data: list[Any]) -> None:
    config = lora(target_modules=["0", "2"])
    plain = run(copy.deepcopy(mlp), data, config, max_steps=3).state_dict()
    outside = torch.compile(wrapped(copy.deepcopy(mlp), config), backend="eager")
    done = eva_kernels.initialize(outside, data, max_steps=3, **QUIET)
    assert isinstance(done, PeftModel)
    assert done.eva_result.state_dict().keys() == plain.keys()
    inside = wrapped(
        torch.compile(copy.deepcopy(mlp), backend="eager"), lora(target_modules=r".*\.(0|2)")
    )
    assert isinstance(inside, PeftModel)
    done = eva_kernels.initialize(inside, data, max_steps=3, **QUIET)
    assert done is inside
    for layer in lora_layers(done).values():
        a = layer.lora_A["default"].weight
        torch.testing.assert_close(a @ a.mT, torch.eye(len(a)), atol=2e-6, rtol=0)


def test_other_init_needs_allow_any_init_or_a_config(mlp: nn.Module, data: list[Any]) -> None:
    plain = lora(init_lora_weights=True, target_modules=["0", "2"])
    model = wrapped(mlp, plain)
    with pytest.raises(ValueError, match=r"init_lora_weights='eva'.*allow_any_init"):
        eva_kernels.initialize(model, data, **QUIET)
    done = eva_kernels.initialize(model, data, allow_any_init=True, max_steps=2, **QUIET)
    assert done is model
    other = wrapped(make_mlp(), lora(init_lora_weights="gaussian", target_modules=["0"]))
    again = eva_kernels.initialize(other, data, lora(), max_steps=2, **QUIET)
    assert again.eva_result.ranks == {"0": 4}
    assert not lora_layers(again)["0"].lora_B["default"].weight.any()


def test_config_fields_that_an_adapter_keeps_are_named(mlp: nn.Module, data: list[Any]) -> None:
    model = wrapped(mlp, lora(target_modules=["0", "2"], lora_alpha=8))
    config = lora(r=3, target_modules=["0"], lora_alpha=32)
    message = r"'default' keeps its own lora_alpha and target_modules"
    with pytest.warns(eva_kernels.EvaWarning, match=message):
        done = eva_kernels.initialize(model, data, config, max_steps=2, **QUIET)
    assert done.eva_result.base_ranks == {"0": 3, "2": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = lora(target_modules={"2", "0"}, lora_alpha=8)
        eva_kernels.calibrate(model, data, again, max_steps=2, **QUIET)


# PEFT warns that it ignores patterns of parameters, but applies them
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match any targeted module")
@pytest.mark.skipif(_peft_compat.convert_peft_config_for_transformers is None, reason="old PEFT")
@pytest.mark.parametrize("targets", [["q_proj", "w1", "w2", "w3"], "all-linear"])
def test_config_with_unfused_names_of_experts_fits_its_adapter(targets: Any) -> None:
    """The same config selects the same layers of an adapter as of a base model."""
    data = text_batches(1)
    base = run(make_mixtral(), data, lora(target_modules=targets), max_steps=1)
    adapted = wrapped(make_mixtral(), lora(target_modules=targets))
    found = run(adapted, data, lora(target_modules=targets), max_steps=1)
    assert found.base_ranks == base.base_ranks
    assert found.alphas == base.alphas
    assert len(set(found.base_ranks.values())) == 2


def test_second_call_returns_the_same_model(llama: nn.Module, texts: list[Any]) -> None:
    model = eva_kernels.initialize(llama, texts, lora(), max_steps=3, **QUIET)
    again = eva_kernels.initialize(model, texts, max_steps=3, **QUIET)
    assert again is model
    assert sum(layer.r["default"] for layer in lora_layers(model).values()) == 56


def test_config_of_the_caller_is_unchanged(llama: nn.Module, texts: list[Any]) -> None:
    config = lora(init_lora_weights=True)
    before = copy.deepcopy(config)
    eva_kernels.initialize(llama, texts, config, max_steps=2, **QUIET)
    assert config == before


def test_bfloat16_base_has_float32_rows(texts: list[Any]) -> None:
    base = make_llama(torch.bfloat16)
    done = eva_kernels.initialize(base, iter(texts), lora(tau=1.0), method="gram", **QUIET)
    inputs = layer_inputs(make_llama(torch.bfloat16), texts, list(done.eva_result.ranks))
    for name, rows in done.eva_result.state_dict().items():
        assert rows.dtype == torch.float32
        assert len(rows) == 0 or lost(rows, inputs[name]) < 1e-5


def test_layer_with_packed_weight_is_named(texts: list[Any]) -> None:
    """As in compressed-tensors, whose layers PEFT wraps only once they are decompressed."""
    model = make_llama()
    packed = model.model.layers[1].self_attn.v_proj
    packed.weight_packed = packed.weight
    del packed.weight
    message = r"layer model\.layers\.1\.self_attn\.v_proj: PEFT cannot wrap it: .* 'weight'"
    with pytest.raises(EvaTypeError, match=message):
        eva_kernels.initialize(model, texts, lora(target_modules=["q_proj", "v_proj"]), **QUIET)
    assert not hooks_of(model)
    assert type(packed) is nn.Linear


def test_options_are_keyword_only() -> None:
    for fn in (eva_kernels.initialize, eva_kernels.calibrate):
        kinds = [p.kind for p in inspect.signature(fn).parameters.values()]
        assert kinds[:3] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 3
        assert inspect.Parameter.POSITIONAL_OR_KEYWORD not in kinds[3:]


@pytest.mark.parametrize(
    ("fields", "ranks", "alphas"),
    [
        ({}, {}, {}),
        ({"r": 6}, dict.fromkeys(("lin", "sub.lin", "sub.other", "head"), 6), {}),
        ({"rank_pattern": {"lin": 3, "^head": 2}}, {"lin": 3, "sub.lin": 3, "head": 2}, {}),
        ({"lora_alpha": 5}, {}, dict.fromkeys(("lin", "sub.lin", "sub.other", "head"), 5)),
        ({"alpha_pattern": {"^lin": 3}}, {}, {"lin": 3}),
    ],
)
@pytest.mark.parametrize("adapted", [True, False])
def test_targets_have_ranks_and_alphas_of_the_config(
    adapted: bool, fields: dict[str, Any], ranks: dict[str, int], alphas: dict[str, float]
) -> None:
    model = wrapped(Clash(), lora(lora_alpha=8)) if adapted else Clash()
    targets = find_targets(model, lora(**{"lora_alpha": 8, **fields}), "default")
    names = ["lin", "sub.lin", "sub.other", "head"]
    assert {t.name: t.rank for t in targets} == {**dict.fromkeys(names, 4), **ranks}
    assert {t.name: t.alpha for t in targets} == {**dict.fromkeys(names, 8), **alphas}

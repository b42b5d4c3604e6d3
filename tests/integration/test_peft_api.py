"""PEFT's two EVA functions: the same signatures, keys, shapes and totals as in PEFT."""

from __future__ import annotations

import copy
import inspect
import sys
from importlib import import_module
from typing import Any

import peft
import peft.tuners.lora.eva as peft_eva
import pytest
import torch
from torch import Tensor, nn

import eva_kernels
import eva_peft
from eva_peft import patch_peft
from integration.conftest import (
    Clash,
    lora,
    lora_layers,
    make_llama,
    make_mlp,
    run,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)
from integration.model.mixtral import FUSED, make_mixtral

FUNCTIONS = ("get_eva_state_dict", "initialize_lora_eva_weights")
QUIET: dict[str, Any] = {"show_progress_bar": False}
EVA_OPTIONS: dict[str, Any] = {**QUIET, "on_not_converged": "ignore", "max_steps": 12}
PLAIN_FUNCTIONS: dict[str, Any] = {
    "forward_fn": lambda model, batch: model(batch["x"]),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
}


def loader() -> list[dict[str, Tensor]]:
    return [{"x": x} for x in vectors(6, rows=60)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_start_with_those_of_peft(name: str) -> None:
    original = inspect.signature(getattr(peft, name)).parameters
    ours = inspect.signature(getattr(eva_kernels, name)).parameters
    assert list(ours)[: len(original)] == list(original)
    for key, parameter in original.items():
        assert ours[key].default == parameter.default, key
        assert ours[key].kind == parameter.kind, key
    rest = list(ours.values())[len(original) :]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in rest)


@pytest.mark.parametrize("prepared", [True, False])
def test_keys_shapes_and_totals_equal_those_of_peft(prepared: bool) -> None:
    config = lora(target_modules=["0", "2"], tau=0.9)
    states = []
    for function, options in (
        (peft.get_eva_state_dict, QUIET),
        (eva_kernels.get_eva_state_dict, EVA_OPTIONS),
    ):
        model: nn.Module = make_mlp()
        given: Any = config
        if prepared:
            model, given = wrapped(model, config), None
        states.append(function(model, loader(), given, **PLAIN_FUNCTIONS, **options))
    original, ours = states
    assert list(ours) == list(original)
    assert sum(map(len, ours.values())) == sum(map(len, original.values())) == 8
    for name, rows in ours.items():
        assert rows.shape[1] == original[name].shape[1]
        assert abs(len(rows) - len(original[name])) <= 1
        assert rows.dtype == torch.float32
        first = torch.cosine_similarity(rows[:2].double(), original[name][:2].double()).abs()
        assert first.min() > 0.98


def test_llama_ranks_and_shapes_agree_with_peft() -> None:
    """PEFT's whole initialisation and ours, on the same text."""
    batches = text_batches(6, samples=8)
    config = lora(r=2, rho=1.5, tau=0.6, target_modules=["q_proj", "o_proj", "down_proj"])
    models = [wrapped(make_llama(), config) for _ in range(2)]
    peft.initialize_lora_eva_weights(models[0], batches, **QUIET)
    eva_kernels.initialize_lora_eva_weights(models[1], batches, **EVA_OPTIONS)
    ranks = [{n: m.r["default"] for n, m in lora_layers(model).items()} for model in models]
    assert sum(ranks[0].values()) == sum(ranks[1].values()) == 12
    for name in set(ranks[0]) & set(ranks[1]):
        one, other = (lora_layers(m)[name] for m in models)
        assert one.lora_A["default"].weight.shape[1] == other.lora_A["default"].weight.shape[1]
    assert isinstance(models[1].eva_result, eva_kernels.EvaResult)


def test_default_functions_select_tokens_as_calibrate_does(texts: list[Any]) -> None:
    config = lora(tau=1.0)
    state = eva_kernels.get_eva_state_dict(make_llama(), iter(texts), config, **EVA_OPTIONS)
    result = run(make_llama(), iter(texts), config, max_steps=12)
    expected = result.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(rows, expected[n]) for n, rows in state.items())
    assert result.shared_inputs  # as only the built-in selection gives


def test_custom_functions_get_arguments_as_in_peft(texts: list[Any]) -> None:
    """As in PEFT, the model input of a user's function is an index of shape (tokens, 2)."""
    calls: list[Any] = []
    ranks: list[int] = []

    def prepare_layer(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
        calls.append((type(layer_input), model_input.shape[1], layer_name))
        return peft_eva.prepare_layer_inputs_fn_language_modeling(
            layer_input, model_input, layer_name
        )

    def prepare_model(model_input: Any, peft_config: Any) -> Any:
        ranks.append(peft_config.r)
        model_input["attention_mask"] = model_input["attention_mask"].clone()
        return peft_eva.prepare_model_inputs_fn_language_modeling(model_input, peft_config)

    config = lora(tau=1.0, target_modules=["q_proj", "down_proj"])
    expected = eva_kernels.get_eva_state_dict(make_llama(), iter(texts), config, **EVA_OPTIONS)
    for given in (
        {"prepare_layer_inputs_fn": prepare_layer},
        {"prepare_layer_inputs_fn": prepare_layer, "prepare_model_inputs_fn": prepare_model},
        {"prepare_model_inputs_fn": prepare_model},
        {"forward_fn": lambda model, batch: model(**batch)},
    ):
        state = eva_kernels.get_eva_state_dict(
            make_llama(), iter(texts), config, **EVA_OPTIONS, **given
        )
        for name, rows in expected.items():
            assert len(rows) == len(state[name])
            assert torch.linalg.svdvals(rows @ state[name].mT).min() > 0.999
    assert {kind for kind, _, _ in calls} == {tuple}
    assert {columns for _, columns, _ in calls} == {2}
    assert {name for _, _, name in calls} == set(expected)
    assert set(ranks) == {4}
    ranks.clear()
    eva_kernels.initialize_lora_eva_weights(
        wrapped(make_llama(), config), texts, prepare_model_inputs_fn=prepare_model, **EVA_OPTIONS
    )
    assert set(ranks) == {4}


@pytest.mark.parametrize(
    ("index", "text"), [(3, "<class 'int'>"), (torch.ones(4), r"torch.Size\(\[4\]\)")]
)
def test_model_input_that_is_no_index_is_rejected(index: Any, text: str) -> None:
    with pytest.raises(
        eva_kernels.EvaTypeError, match=rf"prepare_model_inputs_fn must return .*got {text};"
    ):
        run(make_llama(), text_batches(1), lora(), prepare_model_inputs_fn=lambda *_: index)


@pytest.mark.parametrize("masked", [True, False])
def test_without_a_mask_index_layer_functions_get_the_batch(masked: bool) -> None:
    (text,) = text_batches(1)
    batch = text if masked else {"input_ids": text["input_ids"]}
    model_inputs: list[Any] = []

    def prepare_layer(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
        model_inputs.append(model_input)
        return torch.as_tensor(layer_input[0])

    options: dict[str, Any] = {"prepare_model_inputs_fn": None} if masked else {}
    options |= {"prepare_layer_inputs_fn": prepare_layer, "trim_padding": False, "max_steps": 1}
    run(make_llama(), [batch], lora(target_modules=["down_proj"]), **options)
    assert len(model_inputs) == 2
    for given in model_inputs:
        assert given.keys() == batch.keys()
        assert all(torch.equal(given[key], value) for key, value in batch.items())


@pytest.mark.parametrize(
    ("prefix", "layer"), [("", "q_proj"), ("base_model.model.", "q_proj"), ("", "v_proj")]
)
def test_function_mapping_applies_to_its_layers_only(
    prefix: str, layer: str, texts: list[Any]
) -> None:
    """Other layers keep the masked default; the mapping is not modified.

    Of layers that read one tensor it may name the first that is called, or another."""
    name = f"model.layers.0.self_attn.{layer}"
    mapping = {prefix + name: lambda layer_input, model_input, layer_name: layer_input[0][:, 0]}
    before = dict(mapping)
    config = lora(tau=1.0)
    plain = run(make_llama(), iter(texts), config, method="gram")
    model: nn.Module = wrapped(make_llama(), config) if prefix else make_llama()
    result = run(model, iter(texts), config, method="gram", prepare_layer_inputs_fn=mapping)
    assert mapping == before
    for other in result.components:
        same = torch.allclose(
            result.singular_values[other], plain.singular_values[other], rtol=1e-4
        )
        assert same == (other != name), other


@pytest.mark.parametrize("source_kind", ["base", "adapters"])
@pytest.mark.parametrize("target_kind", ["adapters", "meta", "ddp"])
def test_state_dicts_fit_base_peft_meta_and_ddp_models(
    source_kind: str, target_kind: str, tmp_path: Any
) -> None:
    config = lora(target_modules=["0", "2"])
    source = wrapped(make_mlp(), config) if source_kind == "adapters" else make_mlp()
    state = eva_kernels.get_eva_state_dict(
        source, loader(), config, **PLAIN_FUNCTIONS, **EVA_OPTIONS
    )
    assert all(n.startswith("base_model.model.") == (source_kind == "adapters") for n in state)
    before = {n: rows.clone() for n, rows in state.items()}
    model = wrapped(make_mlp(), config, low_cpu_mem_usage=target_kind == "meta")
    target: nn.Module = model
    if target_kind == "ddp":
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        target = nn.parallel.DistributedDataParallel(model)
        state = {f"module.{n}": rows for n, rows in state.items()}
        before = {f"module.{n}": rows for n, rows in before.items()}
    try:
        eva_kernels.initialize_lora_eva_weights(target, eva_state_dict=state, **QUIET)
    finally:
        if target_kind == "ddp":
            torch.distributed.destroy_process_group()
    assert same_state(before, state)
    for name, layer in lora_layers(model).items():
        rows = next(rows for n, rows in state.items() if n.endswith(name))
        assert torch.equal(layer.lora_A["default"].weight, rows)


def test_keys_with_wrapper_prefixes_are_accepted() -> None:
    config = lora(target_modules=["0", "2"])
    state = eva_kernels.get_eva_state_dict(
        make_mlp(), loader(), config, **PLAIN_FUNCTIONS, **EVA_OPTIONS
    )
    model = wrapped(make_mlp(), config)
    eva_kernels.initialize_lora_eva_weights(
        model, eva_state_dict={f"_orig_mod.module.{n}": rows for n, rows in state.items()}
    )
    assert sum(layer.r["default"] for layer in lora_layers(model).values()) == 8


def test_strict_rejects_unknown_and_missing_layers() -> None:
    config = lora(target_modules=["0", "2"])
    state = eva_kernels.get_eva_state_dict(
        make_mlp(), loader(), config, **PLAIN_FUNCTIONS, **EVA_OPTIONS
    )
    model = wrapped(make_mlp(), config)
    before = state_of(model)
    cases = [
        ({**state, "nine": torch.ones(2, 20)}, r"1 unknown layer \(nine\).*strict=False"),
        ({"0": state["0"]}, r"1 layer of the adapter is missing \(2\)"),
        (
            {"0": state["0"], "4": state["2"]},
            r"1 unknown layer \(4\), and 1 layer of .*is missing \(2\)",
        ),
        (
            {"0": state["0"][:, :9], "2": state["2"]},
            "layer 0: the rows in the state dict have 9 features.* 20",
        ),
        ({"0": state["0"][0], "2": state["2"]}, r"layer 0: expected a \(rank, in_features\)"),
        ({"0": state["0"].tolist(), "2": state["2"]}, r"layer 0: expected a \(rank, in_features\)"),
    ]
    for broken, message in cases:
        with pytest.raises(eva_kernels.EvaError, match=message):
            eva_kernels.initialize_lora_eva_weights(model, eva_state_dict=broken)
        assert same_state(before, state_of(model))
    other = {"nine": torch.full((1, 5), torch.nan)}  # unknown, so not used
    warned = pytest.warns(eva_kernels.EvaWarning, match=r"missing \(2\); missing layers keep")
    with (
        warned,
        pytest.raises(
            eva_kernels.EvaValueError, match="layer 0: the rows in the state dict have 9"
        ),
    ):
        eva_kernels.initialize_lora_eva_weights(
            model, eva_state_dict={**other, "0": state["0"][:, :9]}, strict=False
        )
    assert same_state(before, state_of(model))
    with pytest.warns(eva_kernels.EvaWarning, match=r"missing \(2\); missing layers keep"):
        eva_kernels.initialize_lora_eva_weights(
            model, eva_state_dict={**other, "0": state["0"]}, strict=False
        )
    layers = lora_layers(model)
    assert torch.equal(layers["0"].lora_A["default"].weight, state["0"])
    kept = before["base_model.model.2.lora_A.default.weight"]
    assert torch.equal(layers["2"].lora_A["default"].weight, kept)
    # a layer may be removed while another keeps its default
    with pytest.warns(eva_kernels.EvaWarning, match=r"missing \(0\); missing layers keep"):
        eva_kernels.initialize_lora_eva_weights(
            model, eva_state_dict={"2": state["2"][:0]}, strict=False
        )
    assert list(lora_layers(model)) == ["0"]


def test_missing_layers_on_meta_get_the_default() -> None:
    model = wrapped(Clash(False), lora(), low_cpu_mem_usage=True)
    with pytest.warns(eva_kernels.EvaWarning, match="2 layers of the adapter are missing"):
        eva_kernels.initialize_lora_eva_weights(
            model,
            eva_state_dict={"lin": torch.eye(16)[:3], "sub.lin": torch.eye(16)[:5]},
            strict=False,
        )
    for name, layer in lora_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert len(a) == {"lin": 3, "sub.lin": 5}.get(name, 4)
        assert a.any()
        assert not b.any()


def test_misuse_raises_the_errors_of_peft() -> None:
    init = eva_kernels.initialize_lora_eva_weights
    with pytest.raises(ValueError, match="model must be a PeftModel"):
        init(make_mlp(), loader())
    with pytest.raises(ValueError, match="peft_config is required"):
        eva_kernels.get_eva_state_dict(make_mlp(), loader())
    model = wrapped(make_mlp(), lora(target_modules=["0"]))
    with pytest.raises(ValueError, match="dataloader is required"):
        init(model)
    with pytest.raises(ValueError, match=r"no adapter 'other'; its adapters are \['default'\]"):
        init(model, loader(), adapter_name="other")
    plain = wrapped(make_mlp(), lora(init_lora_weights=True, target_modules=["0"]))
    with pytest.raises(ValueError, match="only be used with `init_lora_weights='eva'`"):
        init(plain, loader())
    model.add_adapter("other", lora(target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="single active adapter"):
        init(model, loader())


def test_arguments_are_not_modified(texts: list[Any]) -> None:
    config = lora(rank_pattern={"q_proj": 2}, init_lora_weights=True)
    before = copy.deepcopy(config)
    batches = copy.deepcopy(texts)
    state = eva_kernels.get_eva_state_dict(make_llama(), texts, config, **EVA_OPTIONS)
    assert config == before
    assert all(torch.equal(a[k], b[k]) for a, b in zip(texts, batches, strict=True) for k in a)
    assert sum(map(len, state.values())) == 12 * 4 + 2 * 2


def test_patch_as_context_manager() -> None:
    originals = {n: getattr(peft, n) for n in FUNCTIONS}
    with patch_peft() as patch:
        assert isinstance(patch, patch_peft)
        for path, module in [*sys.modules.items()]:
            for name in FUNCTIONS if path.split(".")[0] == "peft" else ():
                assert getattr(module, name, None) in (getattr(eva_kernels, name), None), path
        model = wrapped(make_mlp(), lora(target_modules=["0", "2"], tau=0.8))
        peft.initialize_lora_eva_weights(model, loader(), **PLAIN_FUNCTIONS, **QUIET)
        assert isinstance(model.eva_result, eva_kernels.EvaResult)
    assert {n: getattr(peft, n) for n in FUNCTIONS} == originals
    with pytest.raises(KeyError), patch_peft():
        raise KeyError
    assert {n: getattr(peft_eva, n) for n in FUNCTIONS} == originals


def test_patch_without_a_context_lasts() -> None:
    originals = {n: getattr(peft, n) for n in FUNCTIONS}
    patch = eva_kernels.patch_peft()
    try:
        assert peft.get_eva_state_dict is eva_kernels.get_eva_state_dict
        assert peft_eva.initialize_lora_eva_weights is eva_kernels.initialize_lora_eva_weights
    finally:
        patch.__exit__(None, None, None)
    assert {n: getattr(peft, n) for n in FUNCTIONS} == originals


def is_patched() -> bool:
    ours = [getattr(peft, name) is getattr(eva_kernels, name) for name in FUNCTIONS]
    assert all(ours) or not any(ours)
    return all(ours)


def test_patch_can_be_entered_again() -> None:
    with patch_peft() as patch:
        with patch:
            assert is_patched()
        assert is_patched()
    assert not is_patched()
    with patch:
        assert is_patched()
    assert not is_patched()
    patch.__exit__(None, None, None)  # no effect without an active patch
    with patch, patch:
        assert is_patched()
    assert not is_patched()


def test_patches_can_end_in_any_order() -> None:
    originals = {n: getattr(peft, n) for n in (*FUNCTIONS, "get_peft_model")}
    first, second = patch_peft(), patch_peft()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_patched()
    second.__exit__(None, None, None)
    assert {n: getattr(peft, n) for n in originals} == originals


def test_context_exit_keeps_a_lasting_patch() -> None:
    with patch_peft() as block:
        lasting = patch_peft()
    try:
        assert is_patched()
        with block:
            assert is_patched()
        assert is_patched()
    finally:
        lasting.__exit__(None, None, None)
    assert not is_patched()


@pytest.mark.parametrize("name", ["initialize", "calibrate"])
def test_functions_shadow_modules_of_the_same_name(name: str) -> None:
    module = import_module(f"eva_peft.{name}")
    # as the import system does after the first import of the module
    setattr(eva_peft, name, module)
    assert inspect.isfunction(getattr(eva_peft, name))
    assert inspect.isfunction(getattr(eva_kernels, name))


@pytest.mark.parametrize("prepared", [True, False])
def test_state_dict_of_fused_experts_has_rows_per_expert(prepared: bool, texts: list[Any]) -> None:
    config = lora(**FUSED)
    model = wrapped(make_mixtral(), config) if prepared else make_mixtral()
    state = eva_kernels.get_eva_state_dict(model, texts, config, **EVA_OPTIONS)
    prefix = "base_model.model." if prepared else ""
    owner = f"{prefix}model.layers.0.mlp.experts"
    assert {f"{owner}.{i}.gate_up_proj" for i in range(4)} <= set(state)
    assert f"{prefix}model.layers.1.self_attn.q_proj" in state
    target = wrapped(make_mixtral(), config)
    eva_kernels.initialize_lora_eva_weights(target, eva_state_dict=state)
    layers = lora_layers(target).values()
    rows = sum(layer.lora_A["default"].weight.shape[0] for layer in layers)
    assert rows == sum(map(len, state.values()))

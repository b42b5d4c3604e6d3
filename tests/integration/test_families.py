"""Every model family with default options: initialise, train a step, save and load."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import _ConvNd as LoraConvolution
from torch import Tensor, nn

import eva_kernels
from bench.families import FAMILIES, Family
from eva_peft._peft_compat import splits_target_string
from eva_peft.model.routing import RoutedInputs
from integration.conftest import (
    fused,
    hooks_of,
    lora,
    lora_layers,
    lost,
    run,
    same_state,
    state_of,
)

# PEFT warns of Conv1D, of grouped convolutions, and of patterns of parameters.
PEFT_WARNINGS = (
    r"fan_in_fan_out|groups > 1. Merging|_pattern keys did not match any targeted module"
)

# Of an attribute that PEFT reads, and of an argument that LayoutLMv3 of transformers 4 passes.
OTHER_WARNINGS = "is_gradient_checkpointing|The `device` argument is deprecated"


@pytest.fixture(autouse=True)
def restore_peft() -> Iterator[None]:
    update_layer = LoraConvolution.update_layer
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*({PEFT_WARNINGS})")
        yield
    LoraConvolution.update_layer = update_layer


def config_of(family: Family, **fields: Any) -> Any:
    return lora(**{"r": 4, "rho": 2.0, **family.config, **fields})


def make_model(name: str) -> Any:
    model = FAMILIES[name].make_model()
    return fused(model) if "fused" in name else model


def initialize_family(name: str, on_meta: bool) -> PeftModel:
    """Initialise with default options and no user functions."""
    family = FAMILIES[name]
    base, data = make_model(name), family.make_batches(6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message=f".*({PEFT_WARNINGS}|{OTHER_WARNINGS})")
        if on_meta and name != "Conv2d network":  # PEFT refuses "eva" there when it wraps
            model = initialize_on_meta(base, data, family)
        else:
            model = eva_kernels.initialize(base, data, config_of(family), progress=False)
    unexpected = [w for w in caught if not _is_expected(name, str(w.message))]
    assert not unexpected, [str(w.message) for w in unexpected]
    return model


def initialize_on_meta(base: nn.Module, data: Any, family: Family) -> PeftModel:
    from peft import get_peft_model

    config = config_of(family)
    if splits_target_string(base, config):
        pytest.skip("this PEFT takes the letters of target_modules for names in such a model")
    wrapped = get_peft_model(base, config, low_cpu_mem_usage=True)
    assert any(p.is_meta for p in wrapped.parameters())
    model = eva_kernels.initialize(wrapped, data, progress=False)
    assert model is wrapped
    return model


def _is_expected(name: str, message: str) -> bool:
    return name == "Conv2d network" and "ignores the dilation" in message


@pytest.mark.parametrize("on_meta", [False, True], ids=["base", "meta"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family_initialises_trains_saves_and_loads(name: str, on_meta: bool, tmp_path: Any) -> None:
    family = FAMILIES[name]
    batch = family.make_batches(1)[0]
    fresh = family.make_model()
    weights = state_of(fresh)
    with torch.no_grad():
        before = family.loss(fresh, batch)
    model = initialize_family(name, on_meta)
    assert not any(p.is_meta for p in model.parameters())
    with torch.no_grad():  # B is zero
        torch.testing.assert_close(family.loss(model, batch), before)
    layers = lora_layers(model)
    assert layers
    assert model.eva_result.uncalled == []
    check_rows(layers)
    family.loss(model, batch).backward()
    check_gradients(family, layers)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    with torch.no_grad():
        after = family.loss(model, batch)
        assert not torch.equal(after, before)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(family.make_model(), tmp_path).eval()
        torch.testing.assert_close(family.loss(again, batch), after)
    check_base_weights(weights, model)


def check_rows(layers: dict[str, Any]) -> None:
    for name, layer in layers.items():
        a = layer.lora_A["default"].weight.detach().float().flatten(1)
        experts = getattr(layer, "num_experts", 1)
        for rows in a.chunk(experts):
            assert len(rows) == layer.r["default"], name
            # only an input of low rank has fewer independent rows than requested
            torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows)), atol=1e-5, rtol=0)
        assert not layer.lora_B["default"].weight.any()


def check_gradients(family: Family, layers: dict[str, Any]) -> None:
    reached = 0
    for name, layer in layers.items():
        gradient = layer.lora_B["default"].weight.grad
        if family.untrained is not None and re.search(family.untrained[0], name):
            continue
        assert gradient is not None, name
        assert gradient.any(), name
        reached += 1
    assert reached >= 0.5 * len(layers)


def check_base_weights(weights: dict[str, Tensor], model: PeftModel) -> None:
    left = state_of(copy.deepcopy(model).unload())
    # PEFT replaces a classifier's head by a trained copy
    saved = tuple(model.modules_to_save or ())
    kept = {n: v for n, v in weights.items() if not n.startswith(saved) or not saved}
    assert same_state(kept, {n: v for n, v in left.items() if n in kept})


def kept_rows(name: str, x: Tensor, batch: Any) -> Tensor:
    """Return the rows of a layer's input that are tokens, by rules written for this test."""
    flat = x.reshape(-1, x.shape[-1])
    if not isinstance(batch, dict) or re.search("vision|visual|multi_modal", name):
        return flat
    attention, labels = batch.get("attention_mask"), batch.get("labels")
    per_token = labels is not None and labels.dim() == 2
    masks = {}
    if attention is not None:
        masks[tuple(attention.shape)] = attention.bool()
    cross = re.search(r"EncDecAttention\.[kv]$|encoder_attn\.[kv]_proj$", name)
    if per_token and "decoder" in name and not cross:
        masks = {tuple(labels.shape): labels != -100}
    elif per_token and attention is not None and labels.shape == attention.shape:
        masks[tuple(attention.shape)] = attention.bool() & (labels != -100)
    if "timesteps" in batch:
        wide = attention.bool().repeat_interleave(3, dim=1)
        masks[tuple(wide.shape)] = wide
    if "input_values" in batch:  # audio, through two convolutions
        frames = ((attention.sum(1) - 10) // 5 + 1 - 4) // 4 + 1
        kept = torch.arange(((800 - 10) // 5 + 1 - 4) // 4 + 1) < frames[:, None]
        masks = {tuple(kept.shape): kept}
    if "bbox" in batch:  # 17 positions of the image follow the text, in one sequence
        kept = attention.bool() & (labels != -100)
        masks = {
            tuple(kept.shape): kept,
            (4, kept.shape[1] + 17): nn.functional.pad(kept, (0, 17), value=1),
        }
    if "feature_attention_mask" in batch and "audio_tower" in name:  # halved by a convolution
        frames = (batch["feature_attention_mask"].sum(1) + 1) // 2
        masks = {(4, 20): torch.arange(20) < frames[:, None]}
    for shape, mask in masks.items():
        if tuple(x.shape[:-1]) == shape:
            return x[mask]
        if x.dim() == 2 and len(x) == mask.numel() > len(mask):  # flattened
            return x[mask.flatten()]
    return flat


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "Conv2d network"])
def test_components_equal_the_exact_ones(name: str) -> None:
    family = FAMILIES[name]
    model, data = make_model(name), family.make_batches(5)
    with torch.no_grad():  # some models add hooks of their own
        model(**data[0]) if isinstance(data[0], dict) else model(data[0])
    hooks = hooks_of(model)
    result = run(model, iter(data), config_of(family, tau=1.0), method="gram")
    # experts have a test of their own
    unfused = [n for n in result.ranks if ".experts." not in n and n not in result.owners]
    compared = {unfused[0], unfused[len(unfused) // 2], unfused[-1]}
    inputs: dict[str, list[Tensor]] = {n: [] for n in compared}
    current: list[Any] = []

    def hook_for(layer: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = (*args, *kwargs.values())[0]
            inputs[layer].append(kept_rows(layer, x.detach().double(), current[0]))

        return hook

    handles = [
        model.get_submodule(n).register_forward_pre_hook(hook_for(n), with_kwargs=True)
        for n in compared
    ]
    with torch.no_grad():
        for batch in data:
            current[:] = [batch]
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    for layer, parts in inputs.items():
        rows = result.state_dict()[layer]
        if len(rows):
            assert lost(rows, torch.cat(parts)) < 1e-5, layer
    assert hooks_of(model) == hooks


def test_text_mask_is_not_applied_to_image_patches() -> None:
    """The image has as many patches as the text has tokens."""
    family = FAMILIES["Llava (two token streams)"]
    data = family.make_batches(3)
    for batch in data:  # 5 patches with the class token, so 5 tokens of text
        for key in ("input_ids", "attention_mask", "labels"):
            batch[key] = batch[key][:, :5].clone()
        batch["attention_mask"][:2, 4] = 0
        batch["labels"][:, 4] = batch["input_ids"][:, 4]
    config = lora(target_modules=r".*vision_tower.*\.fc1", tau=1.0)
    result = run(family.make_model(), iter(data), config, method="gram", trim_padding=False)
    assert result.tokens == 3 * 4 * 5


def test_tokens_are_tracked_only_where_experts_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = RoutedInputs.__torch_function__

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.tracks_tokens)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RoutedInputs, "__torch_function__", counting)
    family, counts = FAMILIES["Llama"], []
    for batches in (1, 4):
        calls.clear()
        config = config_of(family, tau=1.0)
        run(family.make_model(), iter(family.make_batches(batches)), config, trim_padding=False)
        counts.append(len(calls))
    assert counts[0] > 0
    assert counts[1] == counts[0]  # the first forward pass shows that no tokens are selected
    counts.clear()
    for batches in (2, 5):  # padding from the second pass on, which already stops early
        calls.clear()
        data = family.make_batches(batches)
        data[0] = {"input_ids": data[0]["input_ids"].clamp(min=1)}
        run(family.make_model(), iter(data), config, trim_padding=False)
        counts.append(len(calls))
    assert counts[1] == counts[0] > 0

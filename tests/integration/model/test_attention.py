"""``nn.MultiheadAttention``: components of the inputs of its projections, which are not called."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel
from torch import Tensor, nn

import eva_kernels
from eva_kernels import EvaValueError
from eva_peft.inputs.token_mask import TokenMask
from eva_peft.lora.adapters import write_state_dict
from eva_peft.model.targets import find_targets
from eva_peft.passes.hooks import InputCollector
from eva_peft.passes.ranks import Budget
from helpers import make_stream
from integration.conftest import (
    QUIET,
    VOCABULARY,
    check_shares,
    lora,
    lora_layers,
    lost,
    output_of,
    perturb_b,
    run,
    same_state,
    state_of,
    text_batches,
    wrapped,
)

WIDTH, HEADS = 24, 3
OWN_ATTENTION, ALL_TARGETS = {"target_modules": ["own"]}, ["own", "cross", "middle", "out"]


class AttentionModel(nn.Module):
    """Text that attends to itself, and then, transformed, to its original embeddings."""

    def __init__(self, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(7)
        options: dict[str, Any] = {"batch_first": batch_first, "bias": bias}
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.own = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.out = nn.Linear(WIDTH, 5)
        if bias:
            for attention in (self.own, self.cross):
                nn.init.normal_(attention.in_proj_bias)
                nn.init.normal_(attention.out_proj.bias)
        # fewer directions than the embeddings have, so that ranks differ
        self.middle.weight.data *= 3 * 0.1 ** torch.arange(WIDTH)[:, None]
        self.batch_first = batch_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **ignored: Any) -> Tensor:
        x, padding = self.words(input_ids), attention_mask == 0
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.middle(self.own(x, x, x, key_padding_mask=padding)[0]).tanh()
        key, value = 0.1 * x, 0.1 * x.relu()
        options: dict[str, Any] = {"key_padding_mask": padding, "need_weights": False}
        if self.batch_first:
            y = self.cross(y, key=key, value=value, **options)[0]
        else:
            y = self.cross(y, key, value, **options)[0]
        return torch.as_tensor(self.out(y))


def output_projection_inputs(attention: Any, read: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Return the input of the output projection, (B, T, D), in float64 by the formula."""
    weights = attention.in_proj_weight.double().chunk(3)
    bias = attention.in_proj_bias
    biases = (torch.zeros(3 * WIDTH) if bias is None else bias).double().chunk(3)
    parts = [
        (x @ weight.T + b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for x, weight, b in zip(read, weights, biases, strict=True)
    ]
    scores = parts[0] @ parts[1].mT / math.sqrt(WIDTH // HEADS)
    scores = scores.masked_fill(mask[:, None, None, :] == 0, -math.inf)
    return (scores.softmax(-1) @ parts[2]).transpose(1, 2).flatten(2)


@torch.no_grad()
def projection_inputs(model: AttentionModel, batches: list[Any]) -> dict[str, Tensor]:
    """Return the unmasked input rows of every projection, (N, D)."""
    rows: dict[str, list[Tensor]] = {}
    for batch in batches:
        mask = batch["attention_mask"]
        x = model.words(batch["input_ids"]).double()
        inner = output_projection_inputs(model.own, (x, x, x), mask)
        y = inner @ model.own.out_proj.weight.double().T
        y = y if model.own.out_proj.bias is None else y + model.own.out_proj.bias
        y = (y @ model.middle.weight.double().T + model.middle.bias).tanh()
        three = y, 0.1 * x, 0.1 * x.relu()
        found = {
            "own": [x],
            "own.out_proj": [inner],
            "cross": [*three],
            "cross.out_proj": [output_projection_inputs(model.cross, three, mask)],
        }
        for name, parts in found.items():
            rows.setdefault(name, []).extend(part[mask.bool()] for part in parts)
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_components_equal_the_exact_ones_of_projections(batch_first: bool, bias: bool) -> None:
    model, texts = AttentionModel(batch_first, bias).eval(), text_batches(5, samples=6)
    config = lora(tau=1.0, target_modules=["own", "cross"])
    result = run(model, iter(texts), config, method="gram", trim_padding=False)
    truth = projection_inputs(model, texts)
    assert list(result.ranks) == list(truth)
    for name, rows in truth.items():
        check_shares(result, name, rows)
        assert lost(result.components[name], rows) < 1e-6


@pytest.mark.parametrize("offloaded", [True, False])
def test_hooks_of_accelerate_still_run(offloaded: bool) -> None:
    """They wrap the ``forward`` of a module, and may load its weights."""
    model, texts = AttentionModel().eval(), text_batches(3)
    rows = projection_inputs(model, texts)
    if offloaded:
        kinds = ["MultiheadAttention"]  # accelerate loads all weights of these together
        cpu_offload(model, torch.device("cpu"), preload_module_classes=kinds)
    else:
        where = dict.fromkeys(["words", *ALL_TARGETS], "cpu")
        model = dispatch_model(model, where, main_device="cpu", force_hooks=True)
    result = run(
        model, iter(texts), lora(tau=1.0, **OWN_ATTENTION), method="gram", trim_padding=False
    )
    for name in ("own", "own.out_proj"):
        assert lost(result.components[name], rows[name]) < 1e-6
    assert isinstance(model.own.out_proj, nn.Linear)
    layers = lora_layers(result.apply(model, r=3))
    for name, key in (("own", "own"), ("own.base_layer.out_proj", "own.out_proj")):
        weight = layers[name].lora_A["default"].weight
        assert torch.equal(weight, result.reallocated(r=3).state_dict()[key])


def test_projections_share_a_rank_and_reload(tmp_path: Any) -> None:
    model, texts = AttentionModel(), text_batches(4)
    config = lora(target_modules=ALL_TARGETS)
    done = eva_kernels.initialize(model, texts, config, max_steps=4, **QUIET)
    ranks = done.eva_result.ranks
    assert ranks["own"] == ranks["own.out_proj"] != ranks["cross"] == ranks["cross.out_proj"]
    assert sum(ranks.values()) == 6 * 4
    layers = lora_layers(done)
    for name in ("own", "cross"):
        own, last = layers[name], layers[f"{name}.base_layer.out_proj"]
        assert own.r == last.r == {"default": ranks[name]}
        for layer, key in ((own, name), (last, f"{name}.out_proj")):
            rows = layer.lora_A["default"].weight
            assert torch.equal(rows, done.eva_result.state_dict()[key])
            assert rows.requires_grad
            assert layer.scaling == {"default": config.lora_alpha / config.r}
    done.eval()
    torch.testing.assert_close(
        output_of(done, texts[0]), output_of(AttentionModel().eval(), texts[0])
    )
    perturb_b(done)
    done.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AttentionModel(), tmp_path).eval()
    assert torch.equal(output_of(loaded, texts[0]), output_of(done, texts[0]))
    assert not torch.allclose(
        output_of(done, texts[0]), output_of(AttentionModel().eval(), texts[0])
    )


@pytest.mark.parametrize("adapted", [True, False])
def test_output_projection_named_as_a_target_too(adapted: bool, tmp_path: Any) -> None:
    """PEFT adapts it twice, and one of the two adapters has no effect."""
    config = lora(target_modules=[*ALL_TARGETS, "out_proj"])
    model = wrapped(AttentionModel(), config) if adapted else AttentionModel()
    done = eva_kernels.initialize(model, text_batches(4), config, max_steps=4, **QUIET)
    layers, rows = lora_layers(done), done.eva_result.state_dict()
    for name in ("own", "cross"):
        used = layers[f"{name}.base_layer.out_proj"].lora_A["default"].weight
        assert torch.equal(used, rows[f"{name}.out_proj"])
    eva_kernels.EvaCallback("raise").on_train_begin(None, None, None, model=done)
    perturb_b(done)
    done.save_pretrained(tmp_path)
    loaded, text = PeftModel.from_pretrained(AttentionModel(), tmp_path).eval(), text_batches(1)[0]
    assert torch.equal(output_of(loaded, text), output_of(done.eval(), text))
    used.data.zero_()
    assert not torch.allclose(output_of(loaded, text), output_of(done, text))


def test_both_projections_get_gradients() -> None:
    done = eva_kernels.initialize(
        AttentionModel(), text_batches(4), lora(**OWN_ATTENTION), max_steps=3, **QUIET
    )
    done.train()
    optimizer = torch.optim.SGD([p for p in done.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        done(**text_batches(1)[0]).square().sum().backward()
        optimizer.step()
    layers = lora_layers(done)
    assert len(layers) == 2
    for layer in layers.values():
        assert layer.lora_A["default"].weight.grad.any()
        assert layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_existing_adapters_are_resized(low_cpu_mem_usage: bool) -> None:
    config = lora(target_modules=ALL_TARGETS)
    result = run(AttentionModel().bfloat16(), text_batches(4), config, max_steps=3)
    for name, rank in {"own": 6, "own.out_proj": 6, "cross": 2, "cross.out_proj": 2}.items():
        result.ranks[name] = rank
    options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": low_cpu_mem_usage}
    model = wrapped(AttentionModel().bfloat16(), config, **options)
    dtypes = {n: x.lora_A["default"].weight.dtype for n, x in lora_layers(model).items()}
    done = result.apply(model)
    rows = result.state_dict()
    for path, layer in lora_layers(done).items():
        name = path.replace(".base_layer", "")
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.equal(first, rows[name].to(dtypes[path]))
        assert second.shape[1] == len(first) == result.ranks[name]
        assert first.dtype == second.dtype == dtypes[path]
        assert first.requires_grad
        assert second.requires_grad
        assert not second.any()
    assert output_of(done, text_batches(1)[0]).isfinite().all()


def test_early_exit_is_after_the_attention() -> None:
    model, calls, texts = AttentionModel(), [], text_batches(4, padded=False)
    model.out.register_forward_pre_hook(lambda module, args: calls.append(module))
    eva_kernels.calibrate(model, texts, lora(tau=1.0, **OWN_ATTENTION), max_steps=4, **QUIET)
    assert len(calls) == 1  # the first pass, which finds the last called layer


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_attention_is_not_run_twice(frozen: bool) -> None:
    model, calls = AttentionModel(), []
    forward = model.own.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    model.own.forward = counted  # type: ignore[method-assign]
    targets = find_targets(model, lora(**OWN_ATTENTION), "default")
    collector = InputCollector(targets, lambda *of: make_stream(WIDTH, 4), [None] * 2)
    collector.frozen = {0, 1} if frozen else set()
    collector.begin_forward(TokenMask(None), None, stop_early=False)
    with collector, torch.no_grad():
        model(**text_batches(1)[0])
    assert len(calls) == (1 if frozen else 2)


@pytest.mark.parametrize(("budget", "of_own", "of_middle"), [("params", 6, 2), ("rank", 2, 1)])
def test_rank_costs_include_both_projections(budget: str, of_own: int, of_middle: int) -> None:
    """A rank costs a multiple of the width, or of rows of ``lora_A``."""
    config = lora(r=4, target_modules=["own", "middle"])
    targets = find_targets(AttentionModel(), config, "default")
    assert [t.name for t in targets] == ["own", "own.out_proj", "middle"]
    large, small = np.full(16, 0.06), np.full(16, 0.001)
    own, last, middle = Budget(targets, budget, 0).ranks_for([large, large, small])
    assert own == last > 4
    assert 0 <= 4 * (of_own + of_middle) - own * of_own < of_own
    assert own * of_own + middle * of_middle == 4 * (of_own + of_middle)


@pytest.mark.filterwarnings("ignore:the EVA state dict does not fit")
def test_rows_that_do_not_fit_are_rejected() -> None:
    config = lora(r=4, target_modules=["own", "middle"])
    done = eva_kernels.initialize(AttentionModel(), text_batches(4), config, max_steps=3, **QUIET)
    rows, before = done.eva_result.state_dict(), state_of(done)
    short = {name: value[:2] for name, value in rows.items()}
    last = "own.out_proj"
    cases = [
        (
            {**rows, last: short[last]},
            True,
            "rank 2, but the projections of own must have the same rank",
        ),
        ({**rows, "own": short["own"]}, True, r"another one has 2\)"),
        ({**rows, "own": rows["own"][:0], last: rows[last][:0]}, True, "at least 1"),
        ({"middle": rows["middle"], last: short[last]}, False, "another one has"),
    ]
    for given, strict, message in cases:
        with pytest.raises(EvaValueError, match=message):
            write_state_dict(done, given, "default", strict)
        assert same_state(state_of(done), before)


def test_loaded_result_applies_with_another_rank(tmp_path: Any) -> None:
    result = run(AttentionModel(), text_batches(4), lora(target_modules=ALL_TARGETS), max_steps=3)
    result.save(tmp_path / "eva.safetensors")
    loaded = eva_kernels.EvaResult.load(tmp_path / "eva.safetensors")
    done = loaded.apply(AttentionModel(), r=3)
    layers = lora_layers(done)
    assert layers["own"].r == layers["own.base_layer.out_proj"].r
    assert sum(layer.r["default"] for layer in layers.values()) == 3 * len(layers)


def test_torch_encoder_does_not_take_its_fast_path() -> None:
    torch.manual_seed(7)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    data = [torch.randn(4, 9, WIDTH) for _ in range(3)]
    config = lora(tau=1.0, target_modules=["self_attn", "linear1"])
    result = run(model, data, config, method="gram", max_steps=3)
    assert len(result.ranks) == 6
    assert lost(result.components["layers.0.self_attn"], torch.cat(data).flatten(0, 1)) < 1e-6


def test_attention_with_other_key_width_is_rejected() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.other = nn.Linear(20, 20), nn.MultiheadAttention(20, 2, kdim=10)

    with pytest.raises(EvaValueError, match="other"):
        eva_kernels.calibrate(Other(), [], lora(target_modules=["other"]), **QUIET)

"""Fused experts of transformers models: the components come from the tokens routed to each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import MixtralForCausalLM

import eva_kernels
from bench.families import FAMILIES
from eva_kernels import EvaValueError
from eva_peft._peft_compat import ParamWrapper
from integration.conftest import (
    QUIET,
    check_shares,
    fused,
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
from integration.model.mixtral import EXPERTS, FUSED, make_mixtral


def routed_inputs(model: MixtralForCausalLM, batches: list[Any], layer: int) -> dict[str, Tensor]:
    """Return the inputs of each expert of a layer, from the router's choice."""
    experts = model.model.layers[layer].mlp.experts
    kept: dict[str, list[Tensor]] = {}
    mask: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens, choice, _ = args
        for e in range(EXPERTS):
            rows = tokens[(choice == e).any(1) & mask[0]]
            gate, up = (rows @ experts.gate_up_proj[e].T).chunk(2, dim=1)
            kept.setdefault(f"{e}.gate_up_proj", []).append(rows)
            kept.setdefault(f"{e}.down_proj", []).append(nn.functional.silu(gate) * up)

    handle = experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            mask[:] = [batch["attention_mask"].bool().flatten()]
            model(**batch)
    handle.remove()
    return {f"model.layers.{layer}.mlp.experts.{n}": torch.cat(parts) for n, parts in kept.items()}


@pytest.mark.parametrize("trim", [True, False])
def test_components_of_fused_experts_are_exact(trim: bool) -> None:
    model, texts = make_mixtral(), text_batches(5, samples=6)
    config = lora(tau=1.0, **FUSED)
    result = run(model, iter(texts), config, method="gram", trim_padding=trim)
    assert model.config._experts_implementation == "grouped_mm"
    assert len(result.ranks) == 2 + 2 * 2 * EXPERTS
    for layer in (0, 1):
        for name, rows in routed_inputs(model, texts, layer).items():
            check_shares(result, name, rows)
            assert lost(result.components[name], rows) < 1e-6
    assert result.tokens == sum(int(b["attention_mask"].sum()) for b in texts)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_interleaved_gate_and_up_projections() -> None:
    """In the experts of GPT-OSS every second feature of the product is the gate."""
    model = fused(FAMILIES["GPT-OSS, fused experts"].make_model())
    texts = text_batches(5, samples=6)
    experts: Any = model.model.layers[0].mlp.experts
    kept: dict[int, list[Tensor]] = {e: [] for e in range(EXPERTS)}
    mask: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens, choice = args[0].reshape(-1, 32), args[1]
        for e in range(EXPERTS):
            rows = tokens[(choice == e).any(1) & mask[0]]
            product = rows @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
            gate = product[:, ::2].clamp(max=experts.limit)
            up = product[:, 1::2].clamp(-experts.limit, experts.limit)
            kept[e].append((up + 1) * gate * torch.sigmoid(gate * experts.alpha))

    config = lora(tau=1.0, **FUSED)
    result = run(model, iter(texts), config, method="gram", trim_padding=False)
    experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in texts:
            mask[:] = [batch["attention_mask"].bool().flatten()]
            model(**batch)
    for e, parts in kept.items():
        name = f"model.layers.0.mlp.experts.{e}.down_proj"
        assert lost(result.components[name], torch.cat(parts)) < 1e-6


def test_fused_experts_train_and_reload(tmp_path: Any) -> None:
    base, texts = make_mixtral(), text_batches(3)
    before, weights = output_of(base, texts[0]), state_of(base)
    model = eva_kernels.initialize(base, texts, lora(**FUSED), max_steps=6, **QUIET)
    torch.testing.assert_close(output_of(model, texts[0]), before)
    result = model.eva_result
    state = result.state_dict()
    layers = {
        f"{n.removesuffix('.base_layer')}.{layer.parameter_name}": layer
        for n, layer in lora_layers(model).items()
        if hasattr(layer, "parameter_name")
    }
    assert len(layers) == 4
    for name, layer in layers.items():
        module, _, parameter = name.rpartition(".")
        names = [f"{module}.{e}.{parameter}" for e in range(EXPERTS)]
        assert {result.ranks[n] for n in names} == {layer.r["default"]}
        rows = torch.cat([state[n] for n in names])
        torch.testing.assert_close(layer.lora_A["default"].weight.detach(), rows)
        assert not layer.lora_B["default"].weight.any()
    model(**texts[0], labels=texts[0]["input_ids"]).loss.backward()
    for layer in layers.values():
        assert layer.lora_B["default"].weight.grad.any()
    perturb_b(model)
    for layer in layers.values():
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
    expected = output_of(model, texts[0])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_mixtral(), tmp_path)
    torch.testing.assert_close(output_of(again, texts[0]), expected)
    assert same_state(weights, state_of(again.unload()))


def test_fused_experts_with_adapters_on_meta() -> None:
    texts = text_batches(3)
    config = lora(**FUSED)
    model = wrapped(make_mixtral(), config, low_cpu_mem_usage=True)
    eva_kernels.initialize(model, texts, max_steps=4, **QUIET)
    expected = eva_kernels.initialize(make_mixtral(), texts, config, max_steps=4, **QUIET)
    assert not any(p.is_meta for p in model.parameters())
    assert same_state(state_of(model), state_of(expected))


def test_rank_costs_of_a_parameter_include_all_experts() -> None:
    texts = text_batches(3)
    result = run(make_mixtral(), texts, lora(**FUSED), max_steps=3)
    price = {name: result.owners.get(name, ["", 1])[1] for name in result.ranks}
    assert sorted(set(price.values())) == [1, EXPERTS]
    assert sum(result.ranks.values()) == 4 * len(result.ranks)  # all experts were called
    fewer = result.reallocated(r=1, rho=2.0)
    assert min(r for n, r in fewer.ranks.items() if price[n] > 1) == 1
    for owner in {o for o, _ in result.owners.values()}:
        ranks = {fewer.ranks[n] for n, (o, _) in result.owners.items() if o == owner}
        assert len(ranks) == 1
    sizes = {n: d + result.out_features[n] for n, d in result.in_features.items()}
    others = result.reallocated(budget="params").ranks
    spent, before = (sum(r * sizes[n] for n, r in by.items()) for by in (others, result.base_ranks))
    assert 0.9 * before < spent <= before


# PEFT warns that it ignores patterns of parameters, but applies them
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match any targeted module")
def test_patterns_match_parameters_as_in_peft() -> None:
    """The expected ranks and alphas are those of PEFT's layers."""
    sizes = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.down_proj": 3}}
    sizes |= {"r": 4, "lora_alpha": 12}
    result = run(make_mixtral(), text_batches(1), lora(**FUSED, **sizes), max_steps=1)
    owners = {owner: name for name, (owner, _) in result.owners.items()}
    layers = lora_layers(wrapped(make_mixtral(), lora(**FUSED, **sizes))).values()
    found = {x.parameter_name: x for x in layers if isinstance(x, ParamWrapper)}
    assert {"gate_up_proj", "down_proj"} <= found.keys()
    for owner, name in owners.items():
        layer: Any = found[owner.rpartition(".")[2]]
        assert result.base_ranks[name] == layer.r["default"]
        assert result.alphas[name] == layer.lora_alpha["default"]


def test_state_dicts_that_do_not_fit_are_rejected() -> None:
    texts = text_batches(2)
    result = run(make_mixtral(), texts, lora(**FUSED), max_steps=2)
    model = wrapped(make_mixtral(), lora(**FUSED))
    before = state_of(model)
    name = "model.layers.0.mlp.experts.2.down_proj"
    for rows, message in (
        (result.state_dict()[name][:1], f"layer {name}: rank 1, but the experts of .* same rank"),
        (
            torch.zeros(4, 5),
            f"layer {name}: the rows in the state dict have 5 features, but the layer reads 24",
        ),
    ):
        with pytest.raises(EvaValueError, match=message):
            eva_kernels.initialize_lora_eva_weights(
                model, eva_state_dict={**result.state_dict(), name: rows}
            )
    empty = {n: v[:0] if n in result.owners else v for n, v in result.state_dict().items()}
    with pytest.raises(EvaValueError, match="at least 1"):
        eva_kernels.initialize_lora_eva_weights(model, eva_state_dict=empty)
    assert same_state(before, state_of(model))


def test_failure_restores_the_experts_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_mixtral()
    implementations = []

    def fail(model: nn.Module, batch: Any) -> None:
        implementations.append(model.config._experts_implementation)
        model(**batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, text_batches(1), lora(**FUSED), forward_fn=fail)
    assert implementations == ["eager"]
    assert model.config._experts_implementation == "grouped_mm"
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore:.*never called with a token:eva_kernels.EvaWarning")
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.filterwarnings("ignore:only .* ranks could be given:eva_kernels.EvaWarning")
def test_experts_with_equal_tokens_keep_rank_one(tokens: int) -> None:
    data = [{"input_ids": torch.arange(5, 5 + tokens)[None]}]
    model = eva_kernels.initialize(make_mixtral(), data, lora(**FUSED), **QUIET)
    ranks = {n: layer.r["default"] for n, layer in lora_layers(model).items() if "experts" in n}
    assert set(ranks.values()) == {1}
    model(**data[0], labels=data[0]["input_ids"])


@pytest.mark.filterwarnings("ignore:.*never called with a token:eva_kernels.EvaWarning")
@pytest.mark.filterwarnings("ignore:only .* ranks could be given:eva_kernels.EvaWarning")
def test_rows_without_variance_are_not_whitened() -> None:
    data = text_batches(1, samples=2, length=10)
    config = lora(whiten=True, **FUSED)
    result = eva_kernels.initialize(make_mixtral(), data, config, **QUIET).eva_result
    whitened, plain, without = result.state_dict(), result.state_dict(whiten=False), 0
    for name, rows in whitened.items():
        values = result.singular_values[name][: len(rows)]
        without += int((values == 0).sum())
        torch.testing.assert_close(rows[values == 0], plain[name][values == 0])
        back = rows * values[:, None].sqrt()
        torch.testing.assert_close(back[values > 0], plain[name][values > 0])
    assert without  # some experts got fewer tokens than their shared rank

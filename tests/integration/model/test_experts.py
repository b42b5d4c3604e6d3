"""Experts of users' own modules: masks follow the tokens to each, however they are routed."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import eva_kernels
from eva_kernels import EvaValueError, EvaWarning
from integration.conftest import (
    QUIET,
    VOCABULARY,
    check_shares,
    lora,
    lora_layers,
    lost,
    output_of,
    run,
    text_batches,
)

EXPERTS = 4


class ExpertBlock(nn.Module):
    """Flattened tokens, each sent by indexing to one of three experts, and back."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.how = how
        self.embed, self.router = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 10), nn.SiLU(), nn.Linear(10, 12)) for _ in range(3)
        )
        self.stacked = nn.Parameter(torch.randn(3, 12, 9))
        self.single = nn.Parameter(torch.randn(5, 12))
        self.is_transposed = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.embed(input_ids)
        flat = tokens.reshape(-1, 12)
        choice = self.router(flat).argmax(1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            picked = torch.where(choice == e)[0]
            if self.how == "extra dimension":
                rows = flat[None, picked].reshape(-1, 12)
            elif self.how == "boolean":
                rows = tokens[(choice == e).reshape(input_ids.shape)]
            elif self.how == "sorted first":
                order = choice.argsort(stable=True)
                rows = flat.index_select(0, order)[choice[order] == e]
            elif self.how == "sliced":  # DeepSeek's implementation
                begin = int((choice < e).sum())
                rows = flat[choice.argsort(stable=True)][begin : begin + len(picked)]
            elif self.how == "repeated":
                rows = flat.repeat_interleave(2, dim=0)[picked * 2 + 1]
            elif self.how == "list":  # Mixtral's first implementation
                rows = flat[None, picked.tolist()].reshape(-1, 12)
            else:
                rows = flat[picked]
            if len(rows):
                out = out.index_add(
                    0, picked, expert(rows) + (rows @ self.stacked[e]).sum(1)[:, None]
                )
        return out.reshape(tokens.shape) + (flat @ self.single.T).sum()


class OuterModel(nn.Module):
    """PEFT does not adapt parameters of the outermost module."""

    def __init__(self, how: str = "rows") -> None:
        super().__init__()
        self.moe = ExpertBlock(how)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.moe(input_ids, attention_mask)


@pytest.mark.parametrize(
    "how",
    ["rows", "extra dimension", "boolean", "sorted first", "sliced", "repeated", "list"],
)
def test_masks_follow_tokens_to_expert_modules(how: str) -> None:
    # the first batch has no padding, and so cannot show the routing of padded ones
    whole, padded = text_batches(1, samples=6, padded=False, seed=1), text_batches(4, samples=6)
    outer, texts = OuterModel(how), [*whole, *padded]
    model = outer.moe
    config = lora(tau=1.0, target_modules=r".*experts\.\d\.[02]", target_parameters=["moe.stacked"])
    result = run(outer, iter(texts), config, method="gram", trim_padding=False)
    ids = torch.cat([b["input_ids"].flatten() for b in texts])
    kept = torch.cat([b["attention_mask"].bool().flatten() for b in texts])
    with torch.no_grad():
        tokens = model.embed(ids)
        choice = model.router(tokens).argmax(1)
    for e, expert in enumerate(model.experts):
        rows = tokens[kept & (choice == e)]
        with torch.no_grad():
            inputs = {
                f"experts.{e}.0": rows,
                f"experts.{e}.2": expert[1](expert[0](rows)),
                f"moe.{e}.stacked": rows,
            }
        for end, x in inputs.items():
            name = next(n for n in result.ranks if n.endswith(end))
            check_shares(result, name, x)


class LayerPerLanguage(nn.Module):
    """A layer for each language of a sample, as in X-MOD."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.how, self.embed = how, nn.Embedding(VOCABULARY, 12)
        self.languages = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.embed(input_ids)
        choice = input_ids[:, 0] % 2
        out = torch.zeros_like(tokens)
        for language, layer in enumerate(self.languages):
            here = choice == language
            if self.how == "numbers":
                picked = tokens[here.nonzero().flatten()]
            elif self.how == "index_select":
                picked = tokens.index_select(0, here.nonzero().flatten())
            else:
                picked = tokens[here]
            out[here] = layer(picked)
        return out


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("how", ["numbers", "index_select", "boolean"])
def test_masks_follow_selected_samples(how: str) -> None:
    model, texts = LayerPerLanguage(how), text_batches(4, samples=6)
    texts[0]["input_ids"][:, 0] = 4  # no sample of one language
    config = lora(tau=1.0, target_modules=r".*languages\.\d")
    result = run(model, iter(texts), config, method="gram", trim_padding=False)
    for language in range(2):
        rows = [model.embed(t["input_ids"][here])[t["attention_mask"][here].bool()]
                for t in texts for here in [t["input_ids"][:, 0] % 2 == language]]  # fmt: skip
        assert lost(result.components[f"languages.{language}"], torch.cat(rows).detach()) < 1e-6


class DecoderWithExpert(nn.Module):
    """A decoder with an expert for some of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.config = SimpleNamespace(is_encoder_decoder=True)
        self.embed, self.decoder = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 12)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, **masks: Tensor) -> Tensor:
        rows = self.embed(decoder_input_ids).flatten(0, 1)
        return self.decoder(rows[decoder_input_ids.flatten() % 2 == 0])


def test_mask_of_the_decoder_follows_its_tokens() -> None:
    model, texts = DecoderWithExpert(), text_batches(4)
    batches = [{"input_ids": torch.ones(4, 5).long()} for _ in texts]
    for batch, text in zip(batches, texts, strict=True):
        batch |= {"decoder_input_ids": text["input_ids"].flip(0)}
        batch |= {"decoder_attention_mask": text["attention_mask"]}
    config = lora(tau=1.0, target_modules=["decoder"])
    result = run(model, iter(batches), config, method="gram")
    kept = [b["decoder_input_ids"][b["decoder_attention_mask"].bool()] for b in batches]
    ids = torch.cat(kept)
    check_shares(result, "decoder", model.embed(ids[ids % 2 == 0]).detach())


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # of PEFT 0.17
def test_two_dimensional_parameter_is_initialised() -> None:
    outer, texts = OuterModel(), text_batches(3)
    model = outer.moe
    config = lora(tau=1.0, target_modules=None, target_parameters=["moe.single"])
    result = run(outer, iter(texts), config, method="gram", trim_padding=False)
    ids = torch.cat([b["input_ids"].flatten() for b in texts])
    with torch.no_grad():
        x = model.embed(ids)[torch.cat([b["attention_mask"].bool().flatten() for b in texts])]
    assert list(result.ranks) == ["moe.single"]
    assert lost(result.components["moe.single"], x) < 1e-6
    (layer,) = lora_layers(result.apply(outer)).values()
    assert torch.equal(layer.lora_A["default"].weight, result.state_dict()["moe.single"])


# PEFT 0.17 warns of every unknown layer, later releases do not
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_experts_without_tokens_keep_the_default() -> None:
    model = OuterModel()
    with torch.no_grad():
        model.moe.router.bias[1] = -1e6
    base = copy.deepcopy(model)
    config = lora(target_modules=["experts.0.0"], target_parameters=["moe.stacked"])
    with pytest.warns(EvaWarning, match="1 layer was never called .*1.stacked"):
        peft_model = eva_kernels.initialize(model, text_batches(3), config, max_steps=3, **QUIET)
    layer = next(m for m in peft_model.modules() if hasattr(m, "parameter_name"))
    a = layer.lora_A["default"].weight.detach().unflatten(0, (3, -1))
    assert a.isfinite().all()
    assert a[1].any()
    for e in (0, 2):
        torch.testing.assert_close(a[e] @ a[e].mT, torch.eye(a.shape[1]), atol=3e-6, rtol=0)
    batch = text_batches(1)[0]
    torch.testing.assert_close(output_of(peft_model, batch), output_of(base, batch))


class SortedExperts(nn.Module):
    """Tokens sorted by expert and split, or all of them for every expert at once."""

    def __init__(self, at_once: bool, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.at_once, self.is_transposed = at_once, transposed
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.experts = nn.Parameter(torch.randn(EXPERTS, 16, 16))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = torch.tanh(self.embed(input_ids) + attention_mask[..., None]).reshape(-1, 16)
        if self.at_once:
            return torch.bmm(tokens.expand(EXPERTS, -1, -1), self.experts)
        expert = input_ids.reshape(-1) % EXPERTS
        order = expert.argsort(stable=True)
        sizes = torch.bincount(expert, minlength=EXPERTS).tolist()
        parts = torch.split(tensor=tokens[order], split_size_or_sections=sizes)
        pairs = zip(parts, self.experts, strict=True)
        return torch.cat([nn.functional.linear(part, weight) for part, weight in pairs])


@pytest.mark.parametrize("at_once", [False, True])
def test_lora_a_on_the_output_side_is_rejected(at_once: bool) -> None:
    """The shape of a square weight does not show its orientation."""
    model = SortedExperts(at_once, transposed=not at_once).eval()
    config = lora(target_modules=[], target_parameters=["experts"])
    with pytest.raises(EvaValueError, match="none of the 4 layers, because the weights are"):
        run(model, text_batches(3), config)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("at_once", [False, True])
def test_split_and_batched_expert_products_are_exact(at_once: bool) -> None:
    model, texts = SortedExperts(at_once, transposed=at_once).eval(), text_batches(5, samples=6)
    config = lora(tau=1.0, target_modules=[], target_parameters=["experts"])
    result = run(model, iter(texts), config, method="gram", trim_padding=False)
    assert len(result.ranks) == EXPERTS
    for e in range(EXPERTS):
        rows = []
        for batch in texts:
            ids, kept = batch["input_ids"], batch["attention_mask"].bool()
            own = kept if at_once else kept & (ids % EXPERTS == e)
            rows.append(torch.tanh(model.embed(ids) + batch["attention_mask"][..., None])[own])
        name = next(n for n in result.ranks if n.endswith(f"{e}.experts"))
        assert lost(result.components[name], torch.cat(rows).detach()) < 1e-6, name

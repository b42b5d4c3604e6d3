"""Tiny models, batches and exact references, shared by the integration tests."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import EvaConfig
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import eva_kernels
from helpers import exact, lost_variance

VOCABULARY = 96
# A small encoder and decoder, as fields of BART's config and similar ones.
BOTH_SIDES: dict[str, Any] = {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUIET: dict[str, Any] = {"progress": False, "on_not_converged": "ignore"}
LATER_FIELDS = {"alora_invocation_tokens", "ensure_weight_tying"}  # PEFT 0.17 has none of them


def make_llama(dtype: torch.dtype = torch.float32, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        **fields,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def make_bert() -> BertModel:
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(7)
    size = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**size, **ends)).eval()


def make_mlp() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 28), nn.Tanh(), nn.Linear(28, 4)
    ).eval()


class Clash(nn.Module):
    """Layer names that are suffixes of each other; ``sub.lin`` reads zeros and gets rank 0."""

    def __init__(self, dead: bool = True) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.dead = dead
        self.lin = nn.Linear(16, 16)
        self.sub = nn.ModuleDict({"lin": nn.Linear(16, 16), "other": nn.Linear(16, 16)})
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.lin(x))
        steep = y * 0.3 ** torch.arange(16)
        y = y + self.sub["lin"](torch.zeros_like(x) if self.dead else steep)
        return self.head(torch.tanh(self.sub["other"](y)))


def fused(model: Any) -> Any:
    """Return the model if its experts are one parameter, (experts, out, in), or skip the test."""
    if not hasattr(model.config, "_experts_implementation"):
        pytest.skip("experts of this transformers are modules, or stored as (in, out)")
    return model


def lora(r: int = 4, rho: float = 2.0, tau: float = 0.99, **fields: Any) -> LoraConfig:
    """Return a config; ``whiten`` and other fields of EvaConfig go to ``eva_config``."""
    for name in sorted(LATER_FIELDS & fields.keys()):
        if name not in LoraConfig.__dataclass_fields__:
            pytest.skip(f"this PEFT has no {name}")
    known = {f: fields.pop(f) for f in tuple(fields) if hasattr(EvaConfig(), f)}
    fields.setdefault("init_lora_weights", "eva")
    fields.setdefault("lora_alpha", 8)
    fields.setdefault("target_modules", "all-linear")
    if fields["init_lora_weights"] == "eva":
        fields["eva_config"] = EvaConfig(rho=rho, tau=tau, **known)
    return LoraConfig(r=r, **fields)


def wrapped(base: nn.Module, config: LoraConfig | None = None, **options: Any) -> PeftModel:
    """Return ``get_peft_model``, without PEFT's advice to use meta adapters for EVA."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")
        return get_peft_model(base, config or lora(), **options)


def text_batches(
    count: int = 6,
    samples: int = 4,
    length: int = 24,
    *,
    padded: bool = True,
    labels: bool = False,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Return right-padded token batches whose spectrum decays (frequent and rare tokens)."""
    generator = torch.Generator().manual_seed(seed)
    share = 1 / torch.arange(1, VOCABULARY).float()
    batches = []
    for _ in range(count):
        ids = 1 + torch.multinomial(share, samples * length, True, generator=generator)
        ids = ids.reshape(samples, length)
        mask = torch.ones_like(ids)
        if padded:
            lengths = torch.randint(length // 3, length - 4, (samples,), generator=generator)
            mask = (torch.arange(length) < lengths[:, None]).long()
            ids = ids * mask
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels:
            batch["labels"] = torch.where(mask.bool(), ids, -100)
        batches.append(batch)
    return batches


def vectors(
    count: int = 8, rows: int = 40, features: int = 20, seed: int = 0, rank: int | None = None
) -> list[Tensor]:
    """Return batches of vectors with a decaying spectrum and a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    scale = 0.75 ** torch.arange(features).float()
    if rank is not None:
        scale[rank:] = 0
    x = torch.randn(count * rows, features, generator=generator) * scale
    return list((x @ basis + 0.3).split(rows))


def layer_inputs(
    model: nn.Module, batches: Iterable[Any], names: Sequence[str], masked: bool = True
) -> dict[str, Tensor]:
    """Run the model and return the unmasked input rows of layers, float64, by separate hooks."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    current: dict[str, Tensor | None] = {"mask": None}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args or tuple(kwargs.values()))[0].double()
            mask = current["mask"]
            fits = mask is not None and mask.shape == x.shape[:-1]
            kept[name].append(x[mask] if fits else x.reshape(-1, x.shape[-1]))

        return hook

    handles = [
        model.get_submodule(n).register_forward_pre_hook(hook_for(n), with_kwargs=True)
        for n in names
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # which calls no layer
    try:
        with torch.no_grad():
            for batch in batches:
                if isinstance(batch, dict):
                    has_mask = masked and "attention_mask" in batch
                    current["mask"] = batch["attention_mask"].bool() if has_mask else None
                    model(**{k: v for k, v in batch.items() if k != "labels"})
                else:
                    model(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def exact_pca(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (variances descending, unit rows) of the centred rows of x, float64."""
    values, rows, _ = exact(x)
    return values.square(), rows


def angle(a: Tensor, b: Tensor) -> float:
    """Return the sine of the largest principal angle between two row spaces of equal rank."""
    a, b = (torch.linalg.qr(t.double().mT).Q.mT for t in (a, b))
    return float(torch.linalg.matrix_norm(a - (a @ b.mT) @ b, 2))


def lost(rows: Tensor, x: Tensor) -> float:
    """Return the share of the best captured variance that ``rows`` misses on the data x."""
    return lost_variance(x, rows)


def check_shares(result: Any, name: str, x: Tensor) -> None:
    """Compare the explained variance ratio of a layer with an exact PCA of its inputs."""
    variances, _ = exact_pca(x)
    found = result.explained_variance_ratio[name].double()
    ratio = (variances / variances.sum())[: len(found)]
    torch.testing.assert_close(found, ratio, rtol=1e-3, atol=1e-6)


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, LoraLayer]:
    """Return the layers that own an adapter, by their names in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def hooks_of(model: nn.Module) -> int:
    """Count the forward hooks of all kinds on all modules."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def perturb_b(model: nn.Module, adapter: str = "default") -> None:
    """Give every ``lora_B`` of an adapter values, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model, adapter).values():
            weight = layer.lora_B[adapter].weight
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_((0.1 * noise).to(weight.dtype))


def output_of(model: nn.Module, batch: Any) -> Tensor:
    """Return the first output of a model, in eval mode and without gradients."""
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    return out if isinstance(out, Tensor) else out[0]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_state(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Return whether two states are equal, bit for bit."""
    return before.keys() == after.keys() and all(
        before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before
    )


def run(model: nn.Module, data: Any, config: LoraConfig | None = None, **options: Any) -> Any:
    """Calibrate without a progress bar, and without warnings about convergence."""
    return eva_kernels.calibrate(model, data, config, **{**QUIET, **options})


@pytest.fixture(autouse=True)
def _in_a_single_thread(single_thread: None) -> None: ...


@pytest.fixture(scope="session")
def _llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def llama(_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(_llama)


@pytest.fixture
def mlp() -> nn.Sequential:
    return make_mlp()


@pytest.fixture(scope="session")
def texts() -> list[dict[str, Tensor]]:
    return text_batches()


@pytest.fixture(scope="session")
def data() -> list[Tensor]:
    return vectors()


@pytest.fixture(scope="session")
def llama_result(_llama: LlamaForCausalLM, texts: list[dict[str, Tensor]]) -> Any:
    """Return one exact pass of one epoch over ``texts``, r = 4, all linear layers."""
    return run(copy.deepcopy(_llama), iter(texts), lora(tau=1.0), method="gram")


@pytest.fixture
def initialized(_llama: LlamaForCausalLM, llama_result: Any) -> PeftModel:
    """Return a freshly initialised Llama adapter."""
    return llama_result.apply(copy.deepcopy(_llama))

"""Quantised base models: initialise, train a step, save, load; as a script, prints JSON.

A separate process, since PEFT imports these libraries wherever they are installed, which takes
seconds, and some of them emit warnings."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import eva_kernels
from integration.conftest import QUIET, lora, lora_layers, text_batches

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def make_base(kind: str) -> nn.Module:
    torch.manual_seed(7)
    # widths that 4-bit blocks of 64 divide
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    if kind == "hqq":
        return with_hqq(base).eval()
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization(kind), device_map="cpu"
        ).eval()


def quantization(kind: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "bnb-8":
        return BitsAndBytesConfig(load_in_8bit=True)
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    return BitsAndBytesConfig(**four, bnb_4bit_quant_type=kind.removeprefix("bnb-"))


def with_hqq(base: nn.Module) -> nn.Module:
    """Quantise with the library itself; transformers 5 does not load HQQ."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, module in list(base.named_modules()):
        if name.rpartition(".")[2] in TARGETS:
            config = BaseQuantizeConfig(nbits=4, group_size=64)
            quantized = HQQLinear(module, config, compute_dtype=torch.bfloat16, device="cpu")
            parent = base.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], quantized)
    return base


def _is_unchanged(weight: torch.Tensor, before: torch.Tensor | None) -> bool:
    if before is None or weight.shape != before.shape:
        return False
    if type(weight) is nn.Parameter:
        return torch.equal(weight, before)
    plain = [t.dequantize() if hasattr(t, "dequantize") else t for t in (weight, before)]
    return torch.equal(*plain) if plain[0].shape == plain[1].shape else False


def run_case(kind: str, on_meta: bool) -> dict[str, Any]:
    base, texts = make_base(kind), text_batches(4, labels=True)
    layer = base.get_submodule("model.layers.0.self_attn.q_proj")
    weights = {id(p): p.detach().clone() for p in base.parameters()}
    config = lora(target_modules=TARGETS, task_type="CAUSAL_LM", tau=0.9)
    if on_meta:
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
        eva_kernels.initialize(model, texts, max_steps=8, **QUIET)
    else:
        model = eva_kernels.initialize(base, texts, config, max_steps=8, **QUIET)
    changed = [n for n, p in model.named_parameters() if not _is_unchanged(p, weights.get(id(p)))]
    layers = lora_layers(model)
    rows = [m.lora_A["default"].weight.detach() for m in layers.values()]
    off = max(
        float((a @ a.mT - torch.eye(len(a))).abs().max()) for a in map(torch.Tensor.float, rows)
    )
    model.train()
    loss = model(**texts[0]).loss
    loss.backward()
    gradients = [m.lora_B["default"].weight.grad for m in layers.values()]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    model.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(make_base(kind), folder).eval()
        after, loaded = (m(**texts[0]).logits for m in (model, again))
        with model.disable_adapter():
            before = model(**texts[0]).logits
    return {
        "layer": type(layer).__name__,
        "weight": type(getattr(layer, "weight", None)).__name__,
        "layers": len(layers),
        "orthonormal": off,
        "dtypes": sorted({str(a.dtype) for a in rows}),
        "changed": [name for name in changed if "lora_" not in name],
        "gradients": all(g is not None and bool(g.any()) for g in gradients),
        "moved": float((after - before).abs().max()),
        "reload": float((after - loaded).abs().max()),
        "tokens": model.eva_result.tokens,
    }


def main(cases: list[str]) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for case in cases:
        kind, way = case.split("/")
        try:
            answers[case] = run_case(kind, way == "meta")
        except Exception:
            answers[case] = {"error": traceback.format_exc()}
    return answers


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1:])) + "\n")

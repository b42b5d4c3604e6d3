"""A table of faults: the error names cause, place and remedy, and no state has changed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import save_file
from torch import nn

import eva_kernels
from eva_kernels import EvaError, EvaResult
from integration.conftest import QUIET, lora, make_llama, make_mlp, wrapped
from integration.fault_calls import (
    Broken,
    Complex,
    DictInput,
    RaisesAtOnce,
    adalora_config,
    another_file,
    bad_values,
    checkpoint,
    fail,
    fewer_batches,
    float16_overflow,
    interrupt,
    merged_adapter,
    on_llama,
    on_mlp,
    option,
    other_adapter_merged,
    prompt_model,
    quick_result,
    raising_iterator,
    result_file,
    saved_bytes,
    state_dict,
    trained_adapter,
    truncated_file,
    two_active_adapters,
)
from integration.fault_setup import MLP, Setup


@dataclass(frozen=True)
class Fault:
    """A call, the error that it must raise, and a pattern for the message."""

    call: Callable[[Setup], Any]
    error: type[BaseException] | tuple[type[BaseException], ...]
    text: str


V, T, R = ValueError, TypeError, RuntimeError
FAULTS: dict[str, Fault] = {
    # loaders
    "loader: a number": Fault(lambda s: on_mlp(s, 5), T, "loader must be iterable, got .*int"),
    "loader: a batch": Fault(
        lambda s: on_llama(s, s.texts[0]), T, r"loader is a mapping .*\[batch\]"
    ),
    "loader: empty": Fault(lambda s: on_llama(s, []), V, "empty: it yielded no batch"),
    "loader: fails to start": Fault(lambda s: on_mlp(s, RaisesAtOnce()), Broken, "no file"),
    "loader: fails midway": Fault(lambda s: on_mlp(s, raising_iterator(2)), Broken, "disk"),
    "loader: interrupted": Fault(
        lambda s: on_mlp(s, (interrupt() for _ in [1])), KeyboardInterrupt, ""
    ),
    # batches
    "batch: text": Fault(lambda s: on_llama(s, ["abc"]), T, "batch must be a mapping.*forward_fn"),
    "batch: a number": Fault(lambda s: on_llama(s, [7]), T, "batch must be a mapping.*got.*int"),
    "batch: ragged": Fault(
        lambda s: on_llama(s, [{"input_ids": [[1, 2], [3]]}]), V, "'input_ids'.*lengths.*collator"
    ),
    "batch: unknown argument": Fault(
        lambda s: on_mlp(s, [{"x": s.data[0], "y": s.data[0]}]),
        T,
        "Sequential.forward.input. does not take.*pass forward_fn",
    ),
    "batch: names of another model": Fault(
        lambda s: on_llama(s, [{"anchor_input_ids": torch.ones(2, 9, dtype=torch.long)}]),
        T,
        r"LlamaForCausalLM.forward.*not take.*names \['anchor_input_ids'\].*forward_fn",
    ),
    "batch: token beyond the vocabulary": Fault(
        lambda s: on_llama(s, [{"input_ids": torch.full((2, 9), 9999)}]), IndexError, "out of range"
    ),
    "batch: all masked": Fault(
        lambda s: on_llama(
            s, iter([{**s.texts[0], "attention_mask": torch.zeros(4, 24, dtype=torch.long)}])
        ),
        V,
        "no token reached any of the 14 target layers in 1 forward.*masks of the loader",
    ),
    "batch: another width": Fault(
        lambda s: on_mlp(s, [torch.ones(4, 7)]),
        V,
        r"layer 0, step 1: expected .* 20 features, got .*\(4, 7\).*prepare_layer_inputs_fn",
    ),
    "values: NaN": Fault(
        bad_values(float("nan")), R, 'layer 0, step 2: 1 of 40 tokens holds NaN.*nonfinite="skip"'
    ),
    "values: infinite": Fault(
        bad_values(float("inf")), FloatingPointError, "layer 0, step 2: 1 of 40 tokens .*overflow"
    ),
    "values: float16 overflows": Fault(
        float16_overflow, R, r"layer model\.layers\.0\.mlp\.down_proj, step 1: .* hold NaN.*float16"
    ),
    # configs and targets
    "config: a dict": Fault(
        lambda s: eva_kernels.initialize(s.mlp, s.data, {"r": 4}), T, "expected a LoraConfig"
    ),
    "config: another method": Fault(
        lambda s: eva_kernels.initialize(s.mlp, s.data, IA3Config()), T, "LoraConfig, got .*IA3"
    ),
    "targets: none match": Fault(
        lambda s: on_llama(s, s.texts, lora(target_modules=["query"])),
        V,
        r"target_modules=\{'query'\} matches no linear.*Llama.*can name are .*q_proj",
    ),
    "targets: an embedding": Fault(
        lambda s: on_llama(s, s.texts, lora(target_modules=["embed_tokens"])),
        V,
        "it matches model.embed_tokens, whose inputs EVA cannot read",
    ),
    "targets: not given": Fault(
        lambda s: on_mlp(s, config=lora(target_modules=None)), V, "specify target_modules.*all-lin"
    ),
    "targets: rank against groups": Fault(
        lambda s: eva_kernels.initialize(
            s.add_model(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4))),
            [torch.ones(2, 4, 8, 8)],
            lora(r=6, target_modules=["0"]),
        ),
        V,
        "layer 0: .*4 groups.*r is 6.*rank_pattern",
    ),
    "adapter: unknown": Fault(
        lambda s: eva_kernels.initialize(s.peft, s.data, adapter_name="mine", **QUIET),
        V,
        r"no adapter 'mine'; its adapters are \['default'\]",
    ),
    "adapter: not made for EVA": Fault(
        lambda s: eva_kernels.initialize(
            s.add_model(wrapped(make_mlp(), lora(init_lora_weights=True, **MLP))), s.data, **QUIET
        ),
        V,
        "init_lora_weights='eva'.*allow_any_init=True",
    ),
    "adapter: merged": Fault(
        merged_adapter, R, r"layer 0 has merged.*unmerge_adapter\(\).*unfuse_lora"
    ),
    "adapter: another one merged": Fault(
        other_adapter_merged, R, r"layer 2 has merged adapters \['other'\].*unmerge_adapter\(\)"
    ),
    "adapter: another one merged, apply": Fault(
        lambda s: other_adapter_merged(s, write=True), R, r"layer 2 has merged adapters \['other'\]"
    ),
    "adapter: virtual tokens": Fault(
        prompt_model, T, "adapter 'default' is of type PROMPT_TUNING; EVA initialises LoRA adapters"
    ),
    "config: AdaLoRA": Fault(adalora_config, T, "expected a LoraConfig, got .*AdaLoraConfig"),
    "adapter: trained": Fault(trained_adapter, V, "layers 0, 2.*overwrite_trained=True"),
    "adapter: another method": Fault(
        lambda s: eva_kernels.initialize(
            s.add_model(get_peft_model(make_llama(), IA3Config())), s.texts, **QUIET
        ),
        T,
        "adapter 'default' is of type IA3; .* LoraConfig",
    ),
    # options
    "option: unknown": Fault(option(max_step=3), T, "unknown option 'max_step'.*max_steps"),
    "option: method": Fault(option(method="svd"), V, "method='svd' is unknown.*'gram'"),
    "option: backend": Fault(option(backend="cuda"), V, "backend='cuda' is unknown.*'triton'"),
    "option: max_steps": Fault(option(max_steps=0), V, "max_steps=0 must be at least 1"),
    "option: max_steps as text": Fault(option(max_steps="9"), T, "max_steps='9' must be a whole"),
    "option: max_seconds": Fault(option(max_seconds=0), V, "max_seconds=0 must be positive"),
    "option: tokens_per_step": Fault(
        option(tokens_per_step=0), V, "tokens_per_step=0 must be at least 1"
    ),
    "option: oversample": Fault(option(oversample=0.5), V, "oversample=0.5 must be at least 1"),
    "option: callback": Fault(option(callback=3), T, "callback=3 must be callable"),
    "option: prepare_layer_inputs_fn": Fault(
        option(prepare_layer_inputs_fn={"q_proj": None, "k_proj": 3}),
        T,
        "must be callable, or a map",
    ),
    "option: forward_fn": Fault(option(forward_fn="f"), T, "forward_fn='f' must be callable"),
    "option: checkpoint": Fault(option(checkpoint=3), T, "checkpoint=3 must be a path or None"),
    "option: on_nonfinite": Fault(option(on_nonfinite="drop"), V, "on_nonfinite='drop'.*'skip'"),
    "option: min_rank beyond the budget": Fault(
        option(min_rank=9), V, "min_rank=9 for 2 layers costs .*budget of 8; lower min_rank"
    ),
    "option: memory_budget": Fault(option(memory_budget=9), V, "memory_budget|budget of 9 bytes"),
    # functions of the user
    "function: forward_fn fails": Fault(option(forward_fn=fail), Broken, "mine"),
    "function: forward_fn does nothing": Fault(
        option(forward_fn=lambda m, b: None, max_steps=2), V, "no token reached any of the 2"
    ),
    "function: model inputs fail": Fault(option(prepare_model_inputs_fn=fail), Broken, "mine"),
    "function: layer inputs fail": Fault(option(prepare_layer_inputs_fn=fail), Broken, "mine"),
    "function: unknown layer": Fault(
        option(prepare_layer_inputs_fn={"9": fail}), V, r"names were not found.*\['9'\]"
    ),
    "function: no tensor": Fault(
        option(prepare_layer_inputs_fn=lambda *_: 3), V, "must return a tensor, got .*int.*layer 0"
    ),
    "function: another width": Fault(
        option(prepare_layer_inputs_fn=lambda x, *_: x[0][:, :3]),
        V,
        "layer 0, step 1: expected floating-point tokens of 20 features, got .*3",
    ),
    "function: integers": Fault(
        option(prepare_layer_inputs_fn=lambda x, *_: x[0].long()), V, "layer 0, step 1: .*int64"
    ),
    "function: callback fails": Fault(option(callback=fail), Broken, "mine"),
    "function: interrupted": Fault(option(callback=interrupt), KeyboardInterrupt, ""),
    # models
    "model: a pipeline": Fault(
        lambda s: eva_kernels.initialize(SimpleNamespace(unet=s.mlp), s.data, s.mlp_config),
        T,
        "expected a torch.nn.Module, got .*SimpleNamespace.*pass the model itself",
    ),
    "model: TorchScript": Fault(
        lambda s: eva_kernels.initialize(torch.jit.trace(s.mlp, s.data[0]), s.data, s.mlp_config),
        T,
        "TorchScript.*pass the module that it was made from",
    ),
    "model: a layer without a tensor": Fault(
        lambda s: eva_kernels.initialize(
            s.add_model(DictInput()), s.data, lora(target_modules=["a"])
        ),
        T,
        "unsupported input type in layer a, step 1: .*prepare_layer_inputs_fn",
    ),
    "model: complex inputs": Fault(
        lambda s: eva_kernels.initialize(
            s.add_model(Complex()), s.data, lora(target_modules=["a"])
        ),
        V,
        "layer a, step 1: expected floating-point tokens .*complex64",
    ),
    "model: out of memory": Fault(
        option(forward_fn=lambda m, b: torch.empty(1 << 60)),
        torch.OutOfMemoryError,
        r"out of memory on cpu .*batch of 40 x 20.*estimate\(\)",
    ),
    "model: not converged": Fault(
        option(max_steps=2, on_not_converged="raise"), R, "2 of 2 layers have not.*raise max_steps"
    ),
    # PEFT's names
    "PEFT's name: a base model": Fault(
        lambda s: eva_kernels.initialize_lora_eva_weights(s.mlp, s.data), V, "must be a PeftModel"
    ),
    "PEFT's name: no data": Fault(
        lambda s: eva_kernels.initialize_lora_eva_weights(s.peft), V, "dataloader is required"
    ),
    "PEFT's name: several active": Fault(two_active_adapters, V, "single active adapter"),
    "PEFT's name: no config": Fault(
        lambda s: eva_kernels.get_eva_state_dict(s.mlp, s.data), V, "peft_config is required"
    ),
    # state dicts
    "state dict: unknown layer": Fault(
        state_dict(lambda d: d.update(nine=d["0"])), V, r"1 unknown layer \(nine\).*strict=False"
    ),
    "state dict: missing layer": Fault(
        state_dict(lambda d: d.pop("2")), V, r"is missing \(2\); .*pass strict=False"
    ),
    "state dict: another width": Fault(
        state_dict(lambda d: d.update({"0": d["0"][:, :7]})),
        V,
        "layer 0: .* 7 features.*layer reads 20",
    ),
    "state dict: a vector": Fault(
        state_dict(lambda d: d.update({"0": d["0"][0]})), T, "layer 0: expected a .rank, in_feat"
    ),
    "state dict: no tensor": Fault(
        state_dict(lambda d: d.update({"0": [1.0]})), T, "layer 0: expected a .rank, in_features"
    ),
    # files
    "result: no file": Fault(
        lambda s: EvaResult.load(s.folder / "none.safetensors"), (EvaError, OSError), "none"
    ),
    "result: not safetensors": Fault(
        result_file(lambda p: p.write_bytes(b"hello")), V, "eva.safetensors"
    ),
    "result: truncated": Fault(
        result_file(lambda p: p.write_bytes(saved_bytes(p)[:-300])), V, "eva.safetensors"
    ),
    "result: another file": Fault(
        result_file(lambda p: save_file({"x": torch.zeros(2)}, p)), V, "eva.safetensors"
    ),
    "result: more rank than was tracked": Fault(
        lambda s: quick_result().apply(s.peft, rho=2.25),
        V,
        "layer 0: r=4 and rho=2.25 may need 9 components.*has 8; calibrate again",
    ),
    "checkpoint: another rank": Fault(
        checkpoint(lambda s, p: on_mlp(s, config=lora(r=3, **MLP), checkpoint=p)),
        V,
        "r: 4 in the file, 3 now",
    ),
    "checkpoint: another model": Fault(
        checkpoint(lambda s, p: on_llama(s, s.texts, checkpoint=p)), V, "Sequential.*Llama"
    ),
    "checkpoint: truncated": Fault(checkpoint(truncated_file), V, "pass.safetensors"),
    "checkpoint: another file": Fault(checkpoint(another_file), V, "pass.safetensors"),
    "checkpoint: fewer batches": Fault(
        checkpoint(fewer_batches), V, "written after 3 batches, but the loader ended after 2"
    ),
    "checkpoint: no folder can be made": Fault(
        option(checkpoint="/proc/nowhere/c.safetensors", max_steps=2), (EvaError, OSError), "proc"
    ),
}


# torch warns of complex adapters when PEFT makes them, and one fault has such a layer
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", FAULTS)
def test_fault_raises_its_error_and_changes_nothing(name: str, tmp_path: Path) -> None:
    fault, setup = FAULTS[name], Setup(tmp_path)
    with pytest.raises(fault.error) as caught:
        fault.call(setup)
    text = str(caught.value)
    assert re.search(fault.text, text, re.DOTALL), text
    setup.check()


def test_setup_check_detects_every_change(tmp_path: Path) -> None:
    """``Setup.check`` fails after each kind of change."""
    changes: list[Callable[[Setup], Any]] = [
        lambda s: s.llama.eval(),
        lambda s: s.mlp[0].register_forward_pre_hook(lambda *_: None),
        lambda s: s.mlp[0].weight.data.add_(1e-6),
        lambda s: s.peft.get_parameter("base_model.model.0.lora_A.default.weight").data.zero_(),
        lambda s: s.mlp[2].weight.requires_grad_(False),
        lambda s: torch.rand(1),
        lambda s: random.random(),
        lambda s: s.texts[0].pop("attention_mask"),
        lambda s: setattr(s.config, "r", 5),
        lambda s: setattr(s.llama.config, "use_cache", False),
    ]
    for change in changes:
        setup = Setup(tmp_path)
        setup.check()
        change(setup)
        with pytest.raises(AssertionError):
            setup.check()

"""Wrapping a base model: errors before the pass, restored after failures, trainable results."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Event, Thread, current_thread
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

import eva_kernels
from eva_kernels import EvaError, EvaTypeError, EvaValueError
from eva_peft._peft_compat import (
    exclude_pattern,
    matches_parameter,
    matches_target,
    new_adapters_on_cpu,
    resolved_config,
)
from integration.conftest import (
    QUIET,
    lora,
    lora_layers,
    make_llama,
    make_mlp,
    output_of,
    run,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)


class Attentive(nn.Module):
    """PEFT adapts an ``nn.MultiheadAttention`` together with its output projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.lin = nn.Linear(20, 20)
        self.mha = nn.MultiheadAttention(20, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)[None]
        return self.mha(y, y, y)[0]


def checkpointed(model: Any) -> nn.Module:
    """Enable checkpointing, for which PEFT puts a hook on the embeddings."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    return model


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Return the structure of a model, in its order."""
    config = getattr(model, "config", None)
    return {
        "modules": [(n, id(m), type(m)) for n, m in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "keys": list(model.state_dict()),
        "hooks": [
            [*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "config": None if config is None else copy.deepcopy(config.to_dict()),
    }


@contextmanager
def check_unchanged(model: nn.Module) -> Iterator[list[int]]:
    """Check that a model is unchanged, and yield a list that grows with every forward pass."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    before, state = structure_of(model), state_of(model)
    yield calls
    assert structure_of(model) == before
    assert same_state(state, state_of(model))
    handle.remove()


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "a norm": (
        {"target_modules": ["q_proj", "input_layernorm"]},
        r"layer model\.layers\.0\.input_layernorm: PEFT cannot wrap it: .*not supported",
    ),
    "tokens of an unknown layer": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"nope": [1]}},
        "PEFT cannot wrap the model with this LoraConfig: .*'nope'.* not found",
    ),
    "replicated layers": (
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
        r"layer_replication changes the layers.*first wrap it with peft.get_peft_model",
    ),
    "rank 0": ({"r": 0}, "^r=0 must be at least 1"),
    "a negative rank": ({"r": -2}, "^r=-2 must be at least 1"),
    "a fractional rank": ({"r": 2.5}, r"^r=2.5 must be a whole number"),
    "rank 0 of a layer": (
        {"rank_pattern": {"q_proj": 0}},
        r"^rank_pattern\['q_proj'\]=0 must be at least 1",
    ),
}


@pytest.mark.filterwarnings("ignore:EVA reads the inputs of linear layers")
@pytest.mark.parametrize("case", REJECTED)
def test_configs_that_peft_rejects_fail_before_the_pass(case: str) -> None:
    fields, text = REJECTED[case]
    model = checkpointed(make_llama().train())
    with check_unchanged(model) as calls:
        with pytest.raises((EvaValueError, EvaTypeError), match=text):
            eva_kernels.initialize(model, text_batches(2), lora(**fields), max_steps=2, **QUIET)
        assert not calls


@pytest.mark.parametrize("name", ["a.b", "", 3])
def test_invalid_adapter_names_are_rejected(name: Any) -> None:
    with check_unchanged(make_mlp()) as calls:
        with pytest.raises(
            EvaValueError, match=r"adapter_name=.* must be a non-empty string without a dot"
        ):
            eva_kernels.initialize(make_mlp(), vectors(1), adapter_name=name, **QUIET)
        assert not calls


def test_dry_run_changes_nothing_and_does_not_warn() -> None:
    module = import_module("eva_peft.lora.wrapping")
    config = lora(modules_to_save=["lm_head"], trainable_token_indices=[1, 2], use_dora=True)
    model = make_llama().train()
    with check_unchanged(model), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        module.check_wrapping(model, config, "default")
    assert not warned


def test_wrapping_that_fails_only_on_meta_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("eva_peft.lora.wrapping")
    original, on_meta = module.get_peft_model, []

    def picky(*args: Any, **kwargs: Any) -> Any:
        on_meta.append(torch.empty(0).is_meta)
        if on_meta[-1]:
            raise RuntimeError("Expected all tensors to be on the same device")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "get_peft_model", picky)
    model = eva_kernels.initialize(
        make_mlp(), vectors(), lora(target_modules=["0"]), max_steps=2, **QUIET
    )
    assert on_meta == [True, False, False]
    assert sum(model.eva_result.ranks.values()) == 4


@pytest.mark.parametrize(
    "error_type", [TypeError, ValueError, RuntimeError, torch.OutOfMemoryError]
)
def test_errors_of_peft_keep_their_type(error_type: type[Exception], monkeypatch: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error_type("too much of it")

    monkeypatch.setattr(import_module("eva_peft.lora.wrapping"), "get_peft_model", fail)
    model = make_mlp()
    with check_unchanged(model) as calls:
        with pytest.raises(error_type, match="too much of it") as caught:
            eva_kernels.initialize(model, vectors(1), lora(target_modules=["0"]), **QUIET)
        assert not calls
    is_wrapped = "PEFT cannot wrap the model with this LoraConfig" in str(caught.value)
    assert (
        is_wrapped
        == isinstance(caught.value, EvaError)
        == (error_type is not torch.OutOfMemoryError)
    )


def test_other_threads_are_not_affected_by_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("eva_peft.lora.wrapping")
    original, devices = LoraModel._create_and_replace, []

    def elsewhere(self: Any, *args: Any, **kwargs: Any) -> None:
        thread = Thread(target=lambda: devices.append(nn.Linear(2, 2).weight.device.type))
        thread.start()
        thread.join()
        original(self, *args, **kwargs)
        devices.append(self.model[0].lora_A["default"].weight.device.type)

    monkeypatch.setattr(LoraModel, "_create_and_replace", elsewhere)
    module.check_wrapping(make_mlp(), lora(target_modules=["0"]), "default")
    assert devices == ["cpu", "meta"]


def test_two_threads_restore_the_warning_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("eva_peft.lora.wrapping")
    inside, done = [Event(), Event()], Event()
    original, filters = LoraModel._create_and_replace, list(warnings.filters)
    shown: Any = vars(warnings)["_showwarnmsg_impl"]

    def overlapping(self: Any, *args: Any, **kwargs: Any) -> None:
        number = int(current_thread().name)
        inside[number].set()
        (done if number else inside[1]).wait(0.5)  # the first to enter is the first to leave
        original(self, *args, **kwargs)

    def check() -> None:
        module.check_wrapping(make_mlp(), lora(target_modules=["0"]), "default")
        done.set()

    monkeypatch.setattr(LoraModel, "_create_and_replace", overlapping)
    threads = [Thread(target=check, name=str(number)) for number in range(2)]
    threads[0].start()
    assert inside[0].wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert done.is_set()
    assert warnings.filters == filters
    assert vars(warnings)["_showwarnmsg_impl"] == shown


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("number", [1, 5, 14])
def test_interrupted_wrapping_restores_the_model(
    error: type[BaseException], number: int, llama_result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = LoraModel._create_and_replace, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        calls.append(kwargs["current_key"])
        if len(calls) == number:
            raise error("stop")

    model = checkpointed(make_llama())
    with check_unchanged(model), monkeypatch.context() as patch:
        patch.setattr(LoraModel, "_create_and_replace", failing)
        with pytest.raises(error):
            llama_result.apply(model)
        assert len(calls) == number
    assert sum(m.r["default"] for m in lora_layers(llama_result.apply(model)).values()) == 56


CONFIG_FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient checkpointing": {"checkpointing": True},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "trainable tokens": {"trainable_token_indices": [1, 2]},
    "bias": {"bias": "all"},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("case", CONFIG_FIELDS)
def test_failed_write_restores_the_base_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from eva_peft.lora import adapters

    def stop(self: Any) -> None:
        raise KeyboardInterrupt

    fields = dict(CONFIG_FIELDS[case])
    model = make_llama().train()
    if fields.pop("checkpointing", False):
        checkpointed(model)
    model.lm_head.weight.requires_grad_(False)
    monkeypatch.setattr(adapters._AdapterWriter, "finish", stop)
    with check_unchanged(model), pytest.raises(KeyboardInterrupt):
        eva_kernels.initialize(
            model, text_batches(1), lora(target_modules=["q_proj"], **fields), max_steps=1, **QUIET
        )


def test_failed_write_restores_flags_of_a_frozen_adapter(
    llama_result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eva_peft.lora import adapters

    model = wrapped(make_llama(), lora())
    model.add_adapter("other", lora(init_lora_weights=True))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.requires_grad_(False)
    original, calls = adapters.update_layer, []

    def failing(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(adapters, "update_layer", failing)
    with check_unchanged(model), pytest.raises(KeyboardInterrupt):
        llama_result.apply(model)


def names_of_peft(model: nn.Module, data: Any) -> PeftModel:
    model = wrapped(model, lora())
    eva_kernels.initialize_lora_eva_weights(model, data, show_progress_bar=False, max_steps=2)
    return model


WAYS: dict[str, Callable[[nn.Module, Any], PeftModel]] = {
    "initialize": lambda model, data: eva_kernels.initialize(
        model, data, lora(), max_steps=2, **QUIET
    ),
    "apply": lambda model, data: run(model, data, lora(), max_steps=2).apply(model),
    "apply, other ranks": lambda model, data: run(model, data, lora(), max_steps=2).apply(
        model, r=3
    ),
    "DoRA": lambda model, data: eva_kernels.initialize(
        model, data, lora(use_dora=True), max_steps=2, **QUIET
    ),
    "PEFT's name": names_of_peft,
}


@pytest.mark.filterwarnings("ignore::eva_kernels.NotConvergedWarning")
@pytest.mark.parametrize("way", WAYS)
def test_results_in_inference_mode_are_trainable(way: str) -> None:
    model, data = make_llama(), text_batches(2)
    with torch.inference_mode():
        done = WAYS[way](model, data)
        assert torch.is_inference_mode_enabled()
    plain = {n: p.requires_grad for n, p in WAYS[way](make_llama(), data).named_parameters()}
    assert {n: p.requires_grad for n, p in done.named_parameters()} == plain
    assert not any(p.is_inference() for p in done.parameters())
    done.train()(**data[0], labels=data[0]["input_ids"]).loss.backward()
    assert all(m.lora_B["default"].weight.grad.any() for m in lora_layers(done).values())


@pytest.mark.parametrize("prepared", [True, False])
def test_attention_and_output_projection_are_initialised(prepared: bool, tmp_path: Any) -> None:
    data, config = vectors(4), lora(target_modules=["lin", "mha"])
    model = wrapped(Attentive(), config) if prepared else Attentive()
    done = eva_kernels.initialize(model, data, None if prepared else config, max_steps=3, **QUIET)
    assert set(done.eva_result.ranks) == {"lin", "mha", "mha.out_proj"}
    layers = lora_layers(done)
    assert set(layers) == {"lin", "mha", "mha.base_layer.out_proj"}
    for layer in layers.values():
        rows = layer.lora_A["default"].weight
        torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows)), atol=2e-6, rtol=0)
    done.eval()
    assert torch.allclose(output_of(done, data[0]), output_of(Attentive().eval(), data[0]))
    optimizer = torch.optim.SGD([p for p in done.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        done(data[0]).square().sum().backward()
        optimizer.step()
    assert all(m.lora_B["default"].weight.any() for m in layers.values())
    done.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Attentive(), tmp_path).eval()
    # PEFT merges into the attention's weight and unmerges on every call, which rounds
    torch.testing.assert_close(output_of(again, data[0]), output_of(done, data[0]))


def test_failed_write_restores_an_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from eva_peft.lora import adapters

    def stop(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapters._AdapterWriter, "finish", stop)
    model, config = Attentive(), lora(target_modules=["lin", "mha"])
    with check_unchanged(model), pytest.raises(KeyboardInterrupt):
        eva_kernels.initialize(model, vectors(4), config, max_steps=2, **QUIET)


def test_mixed_models_are_rejected() -> None:
    config = lora(target_modules=["q_proj"], init_lora_weights=True)
    model = get_peft_model(make_llama(), config, mixed=True)
    result = run(make_llama(), text_batches(1), config, max_steps=1)
    with check_unchanged(model) as calls:
        for call in (
            lambda: eva_kernels.initialize(model, text_batches(1), config, **QUIET),
            lambda: result.apply(model),
        ):
            with pytest.raises(EvaTypeError, match="cannot initialise a PeftMixedModel"):
                call()
        assert not calls


def test_replicated_layers_of_a_peft_model_are_initialised() -> None:
    config = lora(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    model = wrapped(make_llama(), config)
    done = eva_kernels.initialize(model, text_batches(2), max_steps=2, **QUIET)
    assert len(done.eva_result.ranks) == 3
    again = done.eva_result.apply(make_llama())
    assert {n: m.r["default"] for n, m in lora_layers(again).items()} == {
        n: m.r["default"] for n, m in lora_layers(done).items()
    }


@pytest.mark.filterwarnings("ignore:.*never called:eva_kernels.EvaWarning")
def test_all_linear_omits_mamba_layers_that_peft_rejects() -> None:
    """ "all-linear" selects what PEFT adapts."""
    size = {"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 1}
    model = MambaForCausalLM(MambaConfig(**size, pad_token_id=0, bos_token_id=0, eos_token_id=0))
    called: list[str] = []
    own: Any = model.backbone.layers[0].mixer.dt_proj
    hook = own.register_forward_hook(lambda *args: called.append("dt_proj"))
    model(**text_batches(1)[0])
    hook.remove()
    done = eva_kernels.initialize(model, text_batches(4), max_steps=4, **QUIET)
    ends = {name.rpartition(".")[2] for name in done.eva_result.ranks}
    assert ends == {
        "in_proj",
        "x_proj",
        *called,
    }  # later releases use the weight of dt_proj directly


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj"])
def test_target_string_that_peft_splits_into_letters(targets: str, monkeypatch: Any) -> None:
    """As PEFT 0.19 does for models whose experts transformers 5 has fused."""
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")

    def convert(config: Any, model: nn.Module, conversions: Any) -> None:
        config.target_modules = set(config.target_modules or ())

    expected = eva_kernels.initialize(
        make_llama(), text_batches(4), lora(target_modules=targets), **QUIET
    )
    name = "convert_peft_config_for_transformers"
    for module in (conversion, import_module("eva_peft._peft_compat")):
        monkeypatch.setattr(module, name, convert)
    done = eva_kernels.initialize(
        make_llama(), text_batches(4), lora(target_modules=targets), **QUIET
    )
    assert done.eva_result.ranks == expected.eva_result.ranks
    assert same_state(state_of(done), state_of(expected))


def test_target_parameters_alone_add_the_default_modules_of_peft() -> None:
    config = lora(target_modules=None, target_parameters=["mlp.down_proj.weight"])
    model = eva_kernels.initialize(make_llama(), text_batches(3), config, max_steps=3, **QUIET)
    ends = {name.split(".", 3)[-1] for name in model.eva_result.ranks}
    assert ends == {"self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj.weight"}
    assert len(model.eva_result.ranks) == len(lora_layers(model)) == 6


@pytest.mark.parametrize(
    ("task", "heads"),
    [
        (TaskType.TOKEN_CLS, ["classifier", "score"]),
        ("QUESTION_ANS", ["qa_outputs"]),
        (None, []),
    ],
)
def test_heads_of_a_task_are_saved_and_not_adapted(task: Any, heads: list[str]) -> None:
    """The given config is not modified."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("body", "classifier", "qa_outputs")})
    config = lora(task_type=task, target_modules="All-Linear", modules_to_save=["norm"])
    before = copy.deepcopy(config)
    found = resolved_config(model, config)
    assert config == before
    assert found.modules_to_save == ["norm", *heads]
    assert [n for n in model if matches_target(found, n)] == [n for n in model if n not in heads]


@pytest.mark.parametrize(
    ("excluded", "matched", "unmatched"),
    [
        ("(?i)q_.*", ["Q_proj", "a.b"], ["x.q_proj", "a_b", "x.a.b"]),
        (["nor.m"], ["nor.m", "x.nor.m", "a.b"], ["xnor.m", "nor_m"]),
        (None, ["a.b"], ["a_b"]),
    ],
)
def test_exclude_pattern_extends_exclude_modules(
    excluded: Any, matched: list[str], unmatched: list[str]
) -> None:
    pattern = exclude_pattern(lora(exclude_modules=excluded), ["a.b"])
    assert [
        n for n in [*matched, *unmatched] if re.fullmatch(pattern, n)
    ] == matched  # as PEFT matches it


def test_target_parameters_match_whole_names() -> None:
    config = lora(target_parameters=["proj"])
    names = ["proj", "a.proj", "up_proj", "proj.a"]
    assert [n for n in names if matches_parameter(config, n)] == names[:2]


def test_new_adapters_on_cpu_restores_the_layer() -> None:
    layer = next(iter(lora_layers(wrapped(make_mlp(), lora())).values()))
    before = {*vars(layer)}
    with new_adapters_on_cpu(layer):
        assert {*vars(layer)} - before
    assert {*vars(layer)} == before

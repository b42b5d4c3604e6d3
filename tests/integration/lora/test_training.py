"""Detection of uninitialised adapters, by warnings or errors, and of trained ones."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn

import eva_kernels
from eva_kernels import (
    EvaCallback,
    EvaRuntimeError,
    EvaTypeError,
    EvaValueError,
    NotInitializedError,
    NotInitializedWarning,
    is_initialized,
    watch,
)
from integration.conftest import (
    QUIET,
    hooks_of,
    lora,
    lora_layers,
    make_llama,
    make_mlp,
    output_of,
    perturb_b,
    run,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)

CONFIG = {"target_modules": ["0", "2"]}


def fresh(**fields: Any) -> PeftModel:
    return wrapped(make_mlp(), lora(**{**CONFIG, **fields}))


def eva_model(**fields: Any) -> PeftModel:
    return eva_kernels.initialize(fresh(**fields), vectors(), max_steps=3, **QUIET)


def by_peft(**fields: Any) -> PeftModel:
    model = wrapped(make_llama(), lora(target_modules=["q_proj"], tau=0.5, **fields))
    peft.initialize_lora_eva_weights(model, text_batches(20), show_progress_bar=False)
    return model


def as_dict(model: PeftModel) -> PeftModel:
    """Make the EVA part of the config a dict, as PEFT 0.17 does on loading."""
    config = model.peft_config["default"]
    if not isinstance(config.eva_config, dict):
        config.eva_config = dict(vars(config.eva_config))
    return model


def loaded(model: PeftModel, folder: Any) -> PeftModel:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(make_mlp(), folder, is_trainable=True)


INITIALISED: dict[str, Callable[[Any], nn.Module]] = {
    "initialised": lambda folder: eva_model(),
    "one rank": lambda folder: eva_model(r=1, rho=1.0),
    "whitened": lambda folder: eva_model(whiten=True),
    "bfloat16": lambda folder: eva_model().to(torch.bfloat16),
    "removed layers": lambda folder: eva_model(r=1, rho=8.0),
    "loaded": lambda folder: loaded(eva_model(), folder),
    "loaded, whitened": lambda folder: loaded(eva_model(whiten=True), folder),
    "whitened, settings as read": lambda folder: as_dict(loaded(eva_model(whiten=True), folder)),
    "trained": lambda folder: trained(fresh(init_lora_weights=True)),
    "by PEFT": lambda folder: by_peft(),
    "compiled": lambda folder: torch.compile(eva_model(), backend="eager"),
    "result applied": lambda folder: run(make_mlp(), vectors(), lora(**CONFIG)).apply(fresh()),
}
NOT_INITIALISED: dict[str, Callable[[Any], nn.Module]] = {
    "fresh": lambda folder: fresh(),
    "one rank": lambda folder: fresh(r=1),
    "whitened": lambda folder: fresh(whiten=True),
    "on meta": lambda folder: get_peft_model(make_mlp(), lora(**CONFIG), low_cpu_mem_usage=True),
    "plain LoRA": lambda folder: fresh(init_lora_weights=True),
    "loaded": lambda folder: loaded(fresh(), folder),
    "wide and in bfloat16": lambda folder: wrapped(
        nn.Sequential(nn.Linear(4096, 8)), lora(r=16, target_modules=["0"])
    ).to(torch.bfloat16),
}


def test_eva_config_as_a_dict_is_read() -> None:
    result = run(fresh(rho=1.0, whiten=True), vectors(), max_steps=3)
    original, again = fresh(rho=1.0, whiten=True), as_dict(fresh(rho=1.0, whiten=True))
    for model in (original, again):
        eva_kernels.initialize(model, vectors(), max_steps=3, **QUIET)
        assert model.eva_result.config.eva_config == result.config.eva_config
    assert same_state(state_of(original), state_of(again))
    applied = result.apply(fresh(), config=as_dict(fresh(whiten=True)).peft_config["default"])
    assert is_initialized(applied)


def trained(model: PeftModel) -> PeftModel:
    perturb_b(model)
    return model


@pytest.mark.parametrize("kind", INITIALISED)
def test_initialised_adapters_are_recognised(kind: str, tmp_path: Any) -> None:
    assert is_initialized(INITIALISED[kind](tmp_path))


@pytest.mark.parametrize("kind", NOT_INITIALISED)
def test_uninitialised_adapters_are_recognised(kind: str, tmp_path: Any) -> None:
    assert not is_initialized(NOT_INITIALISED[kind](tmp_path))


def test_is_initialized_distinguishes_adapters() -> None:
    model = eva_model()
    model.add_adapter("other", lora(target_modules=["0"], init_lora_weights=True))
    assert is_initialized(model, "default")
    assert not is_initialized(model, "other")


def test_is_initialized_rejects_other_models() -> None:
    with pytest.raises(EvaTypeError, match=r"expected a PeftModel, got .*initialize returns one"):
        is_initialized(make_mlp())
    with pytest.raises(EvaValueError, match=r"no adapter 'mine'; its adapters are \['default'\]"):
        is_initialized(fresh(), "mine")
    with pytest.raises(EvaValueError, match=r"'default' is not a LoRA adapter: its type is IA3"):
        is_initialized(get_peft_model(make_llama(), IA3Config()))


TRAINED_CALLS: dict[str, Callable[[PeftModel, Any], Any]] = {
    "initialize": lambda model, more: eva_kernels.initialize(
        model, vectors(), max_steps=2, **QUIET, **more
    ),
    "apply": lambda model, more: run(make_mlp(), vectors(), lora(**CONFIG)).apply(model, **more),
    "PEFT's name": lambda model, more: eva_kernels.initialize_lora_eva_weights(
        model,
        vectors(),
        prepare_model_inputs_fn=None,
        forward_fn=lambda m, x: m(x),
        show_progress_bar=False,
        max_steps=2,
        on_not_converged="ignore",
        **more,
    ),
    "a state dict": lambda model, more: eva_kernels.initialize_lora_eva_weights(
        model, eva_state_dict=run(make_mlp(), vectors(), lora(**CONFIG)).state_dict(), **more
    ),
}


@pytest.mark.parametrize("call", TRAINED_CALLS)
def test_trained_adapters_need_overwrite_trained(call: str) -> None:
    model = trained(fresh())
    before = state_of(model)
    with pytest.raises(
        EvaValueError, match=r"'default' has been trained.*layers 0, 2.*overwrite_trained=True"
    ):
        TRAINED_CALLS[call](model, {})
    assert same_state(before, state_of(model))
    TRAINED_CALLS[call](model, {"overwrite_trained": True})
    assert not same_state(before, state_of(model))
    assert is_initialized(model)


def test_random_b_is_overwritten_with_allow_any_init() -> None:
    """With ``init_lora_weights=False`` lora_B starts random; any init is overwritten on request."""
    model, config = fresh(init_lora_weights=False), lora(target_modules=["0", "2"])
    with pytest.raises(EvaValueError, match="or was not made with lora_B = 0"):
        eva_kernels.initialize(model, vectors(), config, **QUIET)
    eva_kernels.initialize(model, vectors(), allow_any_init=True, **QUIET)
    assert is_initialized(model)
    assert not any(layer.lora_B["default"].weight.any() for layer in lora_layers(model).values())


def dora(dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    model = wrapped(make_mlp().to(dtype), lora(rho=1.0, use_dora=True, **{**CONFIG, **fields}))
    data = [x.to(dtype) for x in vectors()]
    return eva_kernels.initialize(model, data, max_steps=3, **QUIET)


def grow_magnitudes(model: PeftModel, factor: float = 1.5) -> None:
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_magnitude_vector["default"].weight.mul_(factor)


@pytest.mark.parametrize("also_b", [True, False])
def test_trained_magnitudes_are_reset(also_b: bool) -> None:
    """With DoRA the initial output is that of the base model only for the norms of its weights."""
    model, x = dora().eval(), vectors(1)[0]
    kept = {id(p) for p in model.parameters()}
    grow_magnitudes(model)
    if also_b:
        perturb_b(model)
    with pytest.raises(EvaValueError, match=r"'default' has been trained.*layers 0, 2"):
        eva_kernels.initialize(model, vectors(), **QUIET)
    eva_kernels.initialize(model, vectors(), overwrite_trained=True, max_steps=3, **QUIET)
    torch.testing.assert_close(output_of(model, x), output_of(make_mlp(), x))
    assert {id(p) for p in model.parameters()} == kept  # an optimizer may hold them


def test_failed_write_restores_magnitudes(monkeypatch: pytest.MonkeyPatch) -> None:
    from eva_peft.lora import adapters

    def stop(self: Any) -> None:
        raise KeyboardInterrupt

    model, result = dora(), run(make_mlp(), vectors(), lora(rho=1.0, **CONFIG))
    grow_magnitudes(model)
    before = state_of(model)
    monkeypatch.setattr(adapters._AdapterWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        result.apply(model, overwrite_trained=True)
    assert same_state(before, state_of(model))


def test_only_the_written_adapter_is_checked_for_training() -> None:
    model = fresh()
    model.add_adapter("second", lora(**CONFIG))
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            nn.init.ones_(parameter)
    result = run(make_mlp(), vectors(), lora(**CONFIG))
    with pytest.raises(EvaValueError, match="'second' has been trained"):
        result.apply(model, adapter_name="second")
    result.apply(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untrained_magnitudes_do_not_count_as_trained(dtype: torch.dtype, tmp_path: Any) -> None:
    model = dora(dtype)
    model.save_pretrained(tmp_path)
    for base in (make_mlp().to(dtype), make_mlp()):  # also norms of rounded weights
        again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        data = [x.to(base[0].weight.dtype) for x in vectors()]
        eva_kernels.initialize(again, data, max_steps=2, **QUIET)
        grow_magnitudes(again, 1.05)
        with pytest.raises(EvaValueError, match="has been trained"):
            eva_kernels.initialize(again, data, max_steps=2, **QUIET)


def test_trained_magnitudes_of_convolutions_are_reset() -> None:
    def make() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)).eval()

    data = [torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    model = eva_kernels.initialize(
        make(), data, lora(rho=1.0, use_dora=True, target_modules=["0", "2"]), max_steps=3, **QUIET
    ).eval()
    grow_magnitudes(model)
    config = lora(rho=1.0, use_dora=True, target_modules=["0", "2"])
    with pytest.raises(EvaValueError, match="layers 0, 2"):
        eva_kernels.initialize(model, data, config, **QUIET)
    eva_kernels.initialize(model, data, config, overwrite_trained=True, max_steps=3, **QUIET)
    torch.testing.assert_close(output_of(model, data[0]), output_of(make(), data[0]))


def test_trained_adapters_are_rejected_before_any_forward() -> None:
    model, calls = trained(fresh()), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(EvaValueError, match="has been trained"):
        eva_kernels.initialize(model, vectors(), **QUIET)
    assert not calls


def step(model: nn.Module) -> None:
    model.train()
    model(vectors(1)[0]).sum().backward()


def test_watch_warns_once_and_removes_its_hook() -> None:
    model = watch(fresh())
    assert hooks_of(model) == 1
    model.eval()
    model(vectors(1)[0])
    with torch.no_grad():
        model.train()
        model(vectors(1)[0])
    assert hooks_of(model) == 1
    with pytest.warns(NotInitializedWarning, match=r"'default' was made .*initialize\(model, load"):
        step(model)
    assert hooks_of(model) == 0
    step(model)


def test_watch_does_not_warn_without_a_problem() -> None:
    for model in (eva_model(), trained(fresh()), fresh(init_lora_weights=True), make_mlp()):
        step(watch(model))
        assert hooks_of(model) == 0
    model = watch(fresh())
    eva_kernels.initialize(model, vectors(), max_steps=2, **QUIET)
    step(model)


def test_watch_can_raise() -> None:
    model = watch(fresh(), "raise")
    for _ in range(2):  # it raises every time
        with pytest.raises(NotInitializedError, match="never initialised: it trains as plain LoRA"):
            step(model)
    eva_kernels.initialize(model, vectors(), max_steps=2, **QUIET)
    assert hooks_of(model) == 1
    step(model)
    assert hooks_of(model) == 0
    with pytest.raises(EvaValueError, match="action='stop' is unknown"):
        watch(model, "stop")  # type: ignore[arg-type]


def test_watched_model_can_be_copied_and_saved(tmp_path: Any) -> None:
    model = watch(fresh())
    assert same_state(state_of(fresh()), state_of(model))
    torch.save(model, io.BytesIO())
    twin = copy.deepcopy(model)
    with pytest.warns(NotInitializedWarning):
        step(twin)
    model.save_pretrained(tmp_path)


def test_patched_peft_watches_new_adapters() -> None:
    before = peft.get_peft_model
    with eva_kernels.patch_peft():
        assert peft.get_peft_model is not before
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")
            model = peft.get_peft_model(make_mlp(), lora(**CONFIG))
    assert peft.get_peft_model is before
    assert peft.mapping_func.get_peft_model is before
    with pytest.warns(NotInitializedWarning):
        step(model)


class MixedLayers(nn.Module):
    """Layers that EVA reads, some that it cannot read, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.words = nn.Embedding(30, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.words(x)
        return self.linear(self.attention(x, x, x)[0])


def partly(model: PeftModel) -> PeftModel:
    rows = run(make_mlp(), vectors(), lora(**CONFIG)).state_dict()
    del rows["2"]
    with pytest.warns(eva_kernels.EvaWarning, match=r"is missing \(2\)"):
        eva_kernels.initialize_lora_eva_weights(model, eva_state_dict=rows, strict=False)
    return model


@pytest.mark.parametrize("action", ["warn", "raise"])
def test_partly_initialised_adapter_warns(action: Any) -> None:
    message = r"'default' was made .* only a part of it: 1 layer trains as plain LoRA \(2\)\. Call"
    model = watch(partly(fresh()), action)
    with pytest.warns(NotInitializedWarning, match=message):
        step(model)
    assert hooks_of(model) == 0
    with pytest.warns(NotInitializedWarning, match=message):
        EvaCallback(action).on_train_begin(None, None, None, model=model)
    assert is_initialized(model)


def various() -> nn.Module:
    names = ["words", "attention", "linear", "unused"]
    data = [torch.randint(30, (4, 12)) for _ in range(3)]
    with warnings.catch_warnings():  # of layers that keep the default
        warnings.simplefilter("ignore")
        return eva_kernels.initialize(
            MixedLayers(), data, lora(target_modules=names), max_steps=3, min_rank=1, **QUIET
        )


def with_orthonormal_rows() -> nn.Module:
    model = partly(fresh())
    layers = lora_layers(model)
    with torch.no_grad():  # orthonormal, but not written by EVA
        nn.init.orthogonal_(layers["2"].lora_A["default"].weight)
    return model


NO_WARNING_CASES: dict[str, Callable[[Any], nn.Module]] = {
    "left on purpose": lambda folder: various(),
    "loaded": lambda folder: loaded(partly(fresh()), folder),
    "trained": lambda folder: trained(partly(fresh())),
    "rows from elsewhere": lambda folder: with_orthonormal_rows(),
    "another kind": lambda folder: partly_as_plain(),
}


def partly_as_plain() -> nn.Module:
    model = partly(fresh())
    model.peft_config["default"].init_lora_weights = True
    return model


@pytest.mark.parametrize("kind", NO_WARNING_CASES)
def test_intentional_plain_layers_do_not_warn(kind: str, tmp_path: Any) -> None:
    EvaCallback("raise").on_train_begin(None, None, None, model=NO_WARNING_CASES[kind](tmp_path))


def test_inactive_adapters_do_not_warn() -> None:
    model = fresh()
    model.add_adapter("ref", model.peft_config["default"])  # as the reference of DPO
    eva_kernels.initialize(model, vectors(), max_steps=2, **QUIET)
    EvaCallback("raise").on_train_begin(None, None, None, model=model)
    model.set_adapter("ref")
    with pytest.raises(NotInitializedError, match="adapter 'ref' was made with"):
        EvaCallback("raise").on_train_begin(None, None, None, model=model)


def test_callback_warns_or_raises() -> None:
    state: tuple[Any, ...] = (None, None, None)
    with pytest.warns(NotInitializedWarning, match="before the optimizer is made"):
        EvaCallback().on_train_begin(*state, model=fresh())
    with pytest.raises(NotInitializedError):
        EvaCallback("raise").on_train_begin(*state, model=torch.compile(fresh(), backend="eager"))
    with pytest.raises(NotInitializedError):  # SetFit's trainer passes an object that is no module
        EvaCallback("raise").on_train_begin(*state, model=SimpleNamespace(model_body=fresh()))
    for model in (
        eva_model(),
        make_mlp(),
        None,
        SimpleNamespace(model_body=eva_model(), model_head=None),
    ):
        EvaCallback("raise").on_train_begin(*state, model=model)
    with pytest.raises(EvaValueError, match="action='never' is unknown"):
        EvaCallback("never")  # type: ignore[arg-type]


@contextmanager
def gathered(parameters: list[Any]) -> Iterator[None]:
    """Mimic DeepSpeed's ``GatheredParameters`` in one process."""
    for parameter in parameters:
        parameter.data = parameter.ds_tensor
    yield
    for parameter in parameters:
        parameter.data = torch.empty(0)


@pytest.mark.parametrize("expected", [True, False])
def test_partitioned_weights_of_zero_3_are_gathered(
    expected: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    model = loaded(eva_model() if expected else fresh(), tmp_path)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_tensor = number, parameter.data
        parameter.data = torch.empty(0)
    assert is_initialized(model) is expected
    if expected:
        EvaCallback("raise").on_train_begin(None, None, None, model=model)
    else:
        with pytest.raises(NotInitializedError):
            EvaCallback("raise").on_train_begin(None, None, None, model=model)
    assert not any(parameter.numel() for parameter in model.parameters())


def test_flattened_weights_cannot_be_checked() -> None:
    """FullyShardedDataParallel keeps a part of each, or its shape without memory."""
    partial, gone = fresh(), fresh()
    for parameter in partial.parameters():
        parameter.data = parameter.data.flatten()[:3]
    for parameter in gone.parameters():
        parameter.data = parameter.data.clone()
        parameter.data.untyped_storage().resize_(0)
    for model in (partial, gone):
        EvaCallback("raise").on_train_begin(None, None, None, model=model)
        with pytest.raises(
            EvaRuntimeError, match="'default' is initialised cannot be determined, since Fully"
        ):
            is_initialized(model)
    model = partly(fresh())  # EVA marks the weights that it writes
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()[:3]
    assert is_initialized(model)
    EvaCallback("raise").on_train_begin(None, None, None, model=model)

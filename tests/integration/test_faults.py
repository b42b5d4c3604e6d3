"""Invalid input is rejected, or handled, with a message that names cause, place and remedy."""

from __future__ import annotations

import copy
import time
import warnings
from importlib import import_module
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn

import eva_kernels
from eva_kernels import EvaError, EvaTypeError, EvaValueError, EvaWarning, NonFiniteError
from integration.conftest import (
    QUIET,
    Clash,
    exact_pca,
    lora,
    lora_layers,
    make_bert,
    make_llama,
    make_mlp,
    run,
    text_batches,
    vectors,
    wrapped,
)
from integration.fault_calls import DictInput

CONFIG = {"target_modules": ["0", "2"]}


@pytest.mark.parametrize("empty", [list, tuple, lambda: iter(()), lambda: (x for x in [])])
def test_empty_loader_is_rejected(empty: Any) -> None:
    with pytest.raises(EvaValueError, match="dataloader is empty: it yielded no batch"):
        run(make_mlp(), empty(), lora(**CONFIG))


@pytest.mark.parametrize("loader", [5, None, object(), torch.float32])
def test_loader_that_is_not_iterable_is_rejected(loader: Any) -> None:
    with pytest.raises(EvaTypeError, match="the loader must be iterable, got"):
        run(make_mlp(), loader, lora(**CONFIG))


@pytest.mark.parametrize("batch", ["text", b"text", 5, object(), {1, 2}])
def test_batch_of_unknown_type_is_rejected(batch: Any) -> None:
    with pytest.raises(EvaTypeError, match=r"a batch must be a mapping.*got.*forward_fn"):
        run(make_mlp(), [batch], lora(**CONFIG))


@pytest.mark.parametrize("option", [{"layers_to_transform": 9}, {"exclude_modules": ["q_proj"]}])
def test_options_that_exclude_all_targets_are_named(option: dict[str, Any]) -> None:
    with pytest.raises(
        EvaValueError, match=f"can name are .*q_proj.*, and {next(iter(option))} may"
    ):
        run(make_llama(), text_batches(), lora(target_modules=["q_proj"], **option))


def test_no_matching_target_is_rejected() -> None:
    texts = text_batches(1)
    with pytest.raises(
        EvaValueError, match=r"no layer to initialise: target_modules=\{'query'\}.*LlamaForCausalLM"
    ) as caught:
        run(make_llama(), texts, lora(target_modules=["query"]))
    assert "layers that it can name are" in str(caught.value)
    assert "leave them out" not in str(caught.value)

    assert "gate_proj" in str(caught.value)
    with pytest.raises(
        EvaValueError, match=r"it matches .*word_embeddings, whose inputs EVA cannot"
    ):
        run(make_bert(), texts, lora(target_modules=["word_embeddings"]))
    message = r"target_modules='all-linear' matches no .*can name are 0$"
    with pytest.raises(EvaValueError, match=message):
        run(nn.Sequential(nn.Conv2d(3, 4, 3)), [], lora())
    with pytest.raises(EvaValueError, match="PEFT has no default for model type None"):
        run(make_mlp(), vectors(1), lora(target_modules=None))


def test_default_targets_are_those_of_peft() -> None:
    result = run(make_llama(), text_batches(1), lora(target_modules=None), max_steps=1)
    assert {n.rsplit(".")[-1] for n in result.ranks} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("config", [{"r": 4}, "eva", 16, IA3Config()])
def test_config_of_another_type_is_rejected(config: Any) -> None:
    for fn in (eva_kernels.initialize, eva_kernels.calibrate):
        with pytest.raises(EvaTypeError, match="expected a LoraConfig, got"):
            fn(make_mlp(), vectors(1), config)


def test_peft_model_of_another_type_is_rejected() -> None:
    model = get_peft_model(make_llama(), IA3Config())
    for config in (None, lora()):
        with pytest.raises(EvaTypeError, match=r"adapter 'default' is of type IA3; .* LoraConfig"):
            eva_kernels.initialize(model, text_batches(1), config)


def test_unknown_adapter_is_rejected() -> None:
    model = wrapped(make_mlp(), lora(**CONFIG))
    for config in (None, lora(**CONFIG)):
        with pytest.raises(
            EvaValueError, match=r"no adapter 'mine'; its adapters are \['default'\]"
        ):
            eva_kernels.initialize(model, vectors(1), config, adapter_name="mine", **QUIET)


def test_unknown_option_is_rejected() -> None:
    for fn in (eva_kernels.initialize, eva_kernels.calibrate):
        with pytest.raises(EvaTypeError, match=r"unknown option 'max_step'.*max_steps"):
            fn(make_mlp(), vectors(1), lora(**CONFIG), max_step=3)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("on_not_converged", "error", "on_not_converged='error' is unknown.*'warn', 'raise'"),
        ("method", "exact", "method='exact' is unknown.*'auto', 'sketch', 'gram'"),
        ("criterion", "angle", "criterion='angle' is unknown"),
        ("precision", "low", "precision='low' is unknown"),
        ("budget", "memory", "budget='memory' is unknown"),
        ("early_exit", "yes", "early_exit='yes' is unknown"),
        ("max_steps", -1, "max_steps=-1 must be"),
        ("max_steps", None, "max_steps=None must be a whole number"),
        ("max_steps", 2.5, "max_steps=2.5 must be a whole number"),
        ("max_steps", True, "max_steps=True must be a whole number"),
        ("max_tokens", 0, "max_tokens=0 must be"),
        ("max_seconds", float("nan"), "max_seconds=nan must be"),
        ("oversample", float("nan"), "oversample=nan must be at least 1"),
        ("min_rank", -1, "min_rank=-1 must"),
        ("memory_budget", 0, "memory_budget=0 must be"),
        ("memory_budget", "1GB", "memory_budget='1GB' must be a number"),
        ("memory_budget", float("inf"), "memory_budget=inf must be finite"),
        ("seed", "x", "seed='x' must be a whole number"),
    ],
)
def test_invalid_option_values_are_rejected(option: str, value: Any, message: str) -> None:
    with pytest.raises(EvaError, match=message):
        run(make_mlp(), vectors(1), lora(**CONFIG), **{option: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_non_finite_activations_raise_with_layer_and_step(value: float, method: str) -> None:
    data = vectors(4)
    data[2][5, 3] = value
    data[2][7] = value
    with pytest.raises(
        NonFiniteError, match=r"layer 0, step 3: 2 of 40 tokens hold NaN or infinity.*\"skip\""
    ) as caught:
        run(make_mlp(), iter(data), lora(tau=1.0, **CONFIG), method=method)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_non_finite_tokens_are_skipped(method: str) -> None:
    data = vectors(4)
    clean = [x.clone() for x in data]
    keep = torch.ones(40, dtype=torch.bool)
    keep[[5, 7]] = False
    for i in (0, 2):  # also in the first batch, which gives the first basis
        data[i][5, 3], data[i][7] = float("nan"), float("inf")
        clean[i] = clean[i][keep]
    options = {"on_nonfinite": "skip", "method": method}
    result = run(make_mlp(), iter(data), lora(tau=1.0, **CONFIG), **options)
    expected = run(make_mlp(), iter(clean), lora(tau=1.0, **CONFIG), method=method)
    assert result.skipped_tokens == 4
    assert result.tokens == expected.tokens == 156
    torch.testing.assert_close(result.components["0"], expected.components["0"])


def test_non_finite_padding_is_accepted() -> None:
    batches = text_batches(3)
    table = make_llama().model.embed_tokens
    with torch.no_grad():
        for batch in batches:
            x = table(batch.pop("input_ids"))
            x[batch["attention_mask"] == 0] = float("nan")
            batch["inputs_embeds"] = x
    config = lora(target_modules=[r"model.layers.0.self_attn.q_proj"])
    result = run(make_llama(), batches, config, max_steps=3, trim_padding=False)
    assert result.skipped_tokens == 0


def test_overflow_in_half_precision_names_the_layer() -> None:
    model = make_mlp().half()
    with torch.no_grad():
        model[0].weight.mul_(1e4)
        model[1] = nn.Identity()
    with pytest.raises(NonFiniteError, match=r"layer 2, step 1: .*overflow \(float16"):
        run(model, [x.half() * 100 for x in vectors(1)], lora(**CONFIG))


def test_pass_that_does_not_converge_warns_or_raises() -> None:
    def endless() -> Any:
        while True:
            yield torch.randn(60, 20)

    config = lora(tau=1.0, **CONFIG)
    message = (
        r"2 of 2 layers have not converged after 5 forward passes, 300 tokens: 0, 2\. The best"
        ".*max_steps"
    )
    options = {"progress": False, "max_steps": 5, "method": "sketch"}
    with pytest.warns(eva_kernels.NotConvergedWarning, match=message):
        result = eva_kernels.calibrate(make_mlp(), endless(), config, **options)
    assert result.forwards == 5
    assert not any(result.converged.values())
    assert sum(result.ranks.values()) == 8
    with pytest.raises(eva_kernels.NotConvergedError, match=message):
        eva_kernels.calibrate(make_mlp(), endless(), config, on_not_converged="raise", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eva_kernels.calibrate(make_mlp(), endless(), config, on_not_converged="ignore", **options)


def test_messages_use_the_singular_for_counts_of_one() -> None:
    options = {"max_steps": 1, "on_not_converged": "warn"}
    message = "1 of 1 layer has not converged after 1 forward pass, 40 tokens: 0"
    with pytest.warns(eva_kernels.NotConvergedWarning, match=message):
        result = run(make_mlp(), vectors(), lora(target_modules=["0"]), **options)
    assert repr(result) == "EvaResult(1 layer, 40 tokens, 1 step)"
    lines = result.summary().splitlines()
    assert lines[3] == "total rank 4 over 1 layer, 0 of them without an adapter"
    assert lines[4] == "0 of 1 layer converged after 1 step, 1 forward pass, 40 tokens"


def test_max_tokens_and_max_seconds_end_the_pass() -> None:
    config = lora(tau=1.0, **CONFIG)
    result = run(make_mlp(), vectors(), config, max_tokens=100)
    assert (result.forwards, result.tokens) == (3, 120)
    begin = time.perf_counter()
    result = run(make_mlp(), vectors(), config, max_seconds=0.2)
    assert time.perf_counter() - begin < 2
    assert result.forwards > 1
    assert sum(result.ranks.values()) == 8


@pytest.mark.parametrize("method", ["sketch", "gram", "auto"])
def test_rank_is_limited_by_the_width_of_a_layer(method: str) -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.narrow, self.wide = nn.Linear(3, 40), nn.Linear(40, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(
                torch.tanh(self.narrow(x[:, :3])) + 0.1 * torch.cos(9 * x.repeat(1, 2))
            )

    config = lora(r=8, rho=2.0, target_modules=["narrow", "wide"])
    model = eva_kernels.initialize(
        Narrow(), vectors(6, rows=60), config, max_steps=6, method=method, **QUIET
    )
    result = model.eva_result
    assert result.ranks["narrow"] <= 3
    assert sum(result.ranks.values()) == 16  # the remaining budget goes to the other layer
    assert result.components["narrow"].shape == (3, 3)
    for name, layer in lora_layers(model).items():
        a = layer.lora_A["default"].weight
        assert layer.scaling["default"] == pytest.approx(1.0), name
        torch.testing.assert_close(a @ a.mT, torch.eye(len(a)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_inputs_of_low_rank_limit_the_ranks(method: str) -> None:
    result = run(
        make_mlp(), vectors(6, rank=2), lora(tau=1.0, **CONFIG), method=method, max_steps=6
    )
    assert result.numerical_rank["0"] == 2
    assert result.ranks == {"0": 2, "2": 6} or result.ranks["0"] <= 2
    assert sum(result.ranks.values()) <= 8
    assert not result.singular_values["0"][2:].any()
    rows = result.components["0"][:2]
    exact = exact_pca(torch.cat(vectors(6, rank=2)))[1][:2]
    assert torch.linalg.svdvals(rows.double() @ exact.mT).min() > 1 - 1e-6


@pytest.mark.parametrize("method", ["sketch", "gram"])
@pytest.mark.parametrize("constant", [0.0, 3.0, 1e4])
def test_constant_inputs_get_rank_zero(method: str, constant: float) -> None:
    class Dead(Clash):
        def forward(self, x: Tensor) -> Tensor:
            self.sub["lin"](torch.full_like(x, constant))
            return self.head(torch.tanh(self.lin(x)) + self.sub["other"](x))

    result = run(Dead(), vectors(5, features=16), lora(), method=method, max_steps=5)
    assert result.ranks["sub.lin"] == 0
    assert sum(result.ranks.values()) == 16
    assert not result.explained_variance_ratio["sub.lin"].any()
    assert result.numerical_rank["sub.lin"] == 0


def test_small_directions_are_found_beside_an_outlier_feature() -> None:
    """One direction may hold nearly all of the variance, as in language models."""
    torch.manual_seed(0)
    scale = torch.cat([torch.tensor([2000.0]), 0.8 ** torch.arange(127)])
    data = [torch.randn(200, 128) * scale for _ in range(4)]
    model = nn.Sequential(nn.Linear(128, 8))
    exact = exact_pca(torch.cat(data))[0].sqrt()
    for method in ("sketch", "gram"):
        config = lora(tau=1.0, target_modules=["0"])
        result = run(model, iter(data), config, method=method)
        assert result.ranks == {"0": 4}
        found = result.singular_values["0"][:4].double()
        torch.testing.assert_close(found, exact[:4], rtol=0.05, atol=0)


def test_batches_of_one_token() -> None:
    data = torch.cat(vectors(2)).split(1)
    result = run(make_mlp(), iter(data), lora(tau=1.0, **CONFIG), method="sketch")
    assert result.tokens == 80
    assert sum(result.ranks.values()) == 8
    few = run(make_mlp(), iter(data[:3]), lora(tau=1.0, **CONFIG))
    assert few.steps == 1
    assert max(few.ranks.values()) <= 2  # three points span two directions


@pytest.mark.parametrize("position", [0, 2])
def test_batches_without_samples_or_tokens_are_skipped(position: int) -> None:
    texts = text_batches(3)
    expected = run(make_llama(), iter(texts), lora(tau=1.0), method="gram")
    for selection in (slice(0, 0), (slice(None), slice(0, 0))):
        texts.insert(position, {key: value[selection] for key, value in texts[-1].items()})
    found = run(make_llama(), iter(texts), lora(tau=1.0), method="gram")
    assert found.ranks == expected.ranks
    assert (found.tokens, found.forwards) == (expected.tokens, 5)


@pytest.mark.parametrize("sharded", [False, True])
def test_sharded_model_runs_empty_batches_too(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("eva_peft.calibrate"), "is_sharded", lambda model: sharded)
    model, calls = make_mlp(), []
    model.register_forward_pre_hook(lambda *given: calls.append(1))
    data = [*vectors(2), torch.empty(0, 20)]
    run(model, iter(data), lora(tau=1.0, **CONFIG))
    assert len(calls) == (3 if sharded else 2)


def test_batch_with_one_empty_tensor_is_not_skipped() -> None:
    texts = text_batches(3)
    expected = run(make_llama(), iter(texts), lora(tau=1.0), method="gram")
    model = make_llama()
    forward = model.forward
    model.forward = lambda prefix_ids, **batch: forward(**batch)
    data = [{"prefix_ids": torch.empty(4, 0), **batch} for batch in texts]
    assert run(model, iter(data), lora(tau=1.0), method="gram").ranks == expected.ranks


def test_only_empty_batches_are_rejected() -> None:
    with pytest.raises(EvaValueError, match=r"no token reached|no tokens"):
        run(make_mlp(), iter([torch.empty(0, 20)]), lora(**CONFIG))


def test_pass_ends_after_an_epoch_without_tokens() -> None:
    texts, model, calls = text_batches(3), make_llama(), []
    for batch in texts:
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
    model.register_forward_pre_hook(lambda *given: calls.append(1))
    with pytest.raises(EvaValueError, match="in 3 forward passes; check the attention and label"):
        run(model, texts, lora(), trim_padding=False)
    assert len(calls) == 3


def test_layer_with_only_non_finite_tokens_is_reported() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(20, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * torch.nan)

    options = {"on_nonfinite": "skip", "max_steps": 4, "on_not_converged": "raise"}
    with pytest.warns(EvaWarning, match="1 layer was never called with a token that counts"):
        result = run(Broken(), vectors(4), lora(tau=0.5, target_modules=["a", "b"]), **options)
    assert result.converged == {"a": True}
    assert result.skipped_tokens == 160
    with pytest.raises(EvaValueError, match="160 tokens with NaN or infinity were left out"):
        run(Broken(), vectors(4), lora(target_modules=["b"]), **options)


def test_loader_that_masks_all_tokens_is_rejected() -> None:
    batches = text_batches(2)
    for batch in batches:
        batch["attention_mask"].zero_()
    message = "no token reached any of the 14 target layers.* masks of the loader$"
    with pytest.raises(EvaValueError, match=message):
        run(make_llama(), batches, lora(), max_steps=3)
    batches = text_batches(2, labels=True)
    for batch in batches:
        batch["labels"].fill_(-100)
    with pytest.raises(EvaValueError, match="in 2 forward passes; check the attention and label"):
        run(make_llama(), batches, lora(), max_steps=3)


def test_layer_without_tokens_warns_and_is_listed_as_uncalled() -> None:
    mapping = {"2": lambda layer_input, model_input, name: layer_input[0][:0]}
    with pytest.warns(EvaWarning, match=r"1 layer was never called with a token.*: 2"):
        result = run(
            make_mlp(), vectors(), lora(**CONFIG), max_steps=3, prepare_layer_inputs_fn=mapping
        )
    assert result.uncalled == ["2"]
    assert result.ranks == {"0": 4}


def test_results_of_prepare_layer_inputs_fn_are_checked() -> None:
    def check_rejected(function: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            run(make_mlp(), vectors(2), lora(**CONFIG), prepare_layer_inputs_fn=function)

    check_rejected({"9": lambda *_: None}, EvaValueError, r"module names were not found.*\['9'\]")
    check_rejected(
        lambda *_: None, EvaValueError, "must return a tensor, got .*NoneType.* for layer 0"
    )
    check_rejected(
        lambda x, *_: x[0][:, :3], EvaValueError, r"layer 0, step 1: expected .* 20 features"
    )
    check_rejected(lambda x, *_: x[0].long(), EvaValueError, "expected floating-point tokens")
    check_rejected(lambda x, *_: x[0].sum(), EvaValueError, "layer 0, step 1: expected")


def test_triton_backend_that_cannot_run_is_an_error() -> None:
    from eva_kernels.ops import triton_unavailable

    reason = triton_unavailable("cpu")
    if reason is None:
        pytest.skip("triton runs on this device")
    with pytest.raises(eva_kernels.EvaRuntimeError, match=r'backend="triton" cannot run') as caught:
        run(make_mlp(), vectors(2), lora(**CONFIG), backend="triton")
    assert reason in str(caught.value)


def test_layer_input_without_tensor_is_rejected() -> None:
    with pytest.raises(EvaTypeError, match=r"unsupported input type in layer a.*prepare_layer"):
        run(DictInput(), vectors(1), lora(target_modules=["a"]))


def test_errors_subclass_the_builtin_exceptions_of_peft() -> None:
    assert issubclass(EvaValueError, ValueError)
    assert issubclass(EvaTypeError, TypeError)
    assert issubclass(NonFiniteError, RuntimeError)
    assert issubclass(eva_kernels.NotConvergedWarning, UserWarning)


def test_failed_pass_leaves_a_base_model_unchanged() -> None:
    model = make_mlp()
    kinds = [type(m) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(EvaValueError):
        eva_kernels.initialize(model, [], lora(**CONFIG))
    assert [type(m) for m in model.modules()] == kinds
    assert not hasattr(model, "peft_config")
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_result_for_another_model_is_rejected_without_changes() -> None:
    result = run(make_mlp(), vectors(), lora(**CONFIG), max_steps=3)
    model = nn.Sequential(*make_mlp()[:2], nn.Linear(24, 9))
    kinds = [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(EvaValueError, match=r"unknown layer \(2\)"):
        result.apply(model, lora(target_modules=["0"]))
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "peft_config")
    wide = nn.Sequential(nn.Linear(30, 24), nn.Tanh(), nn.Linear(24, 4))
    with pytest.raises(
        EvaValueError,
        match="layer 0: the rows in the state dict have 20 features, but the layer reads 30",
    ):
        result.apply(wide)
    assert result.apply(model).eva_result is result

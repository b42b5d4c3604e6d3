"""Layers with the same input share a stream, found by identity and split when inputs differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eva_kernels
from eva_peft.passes.shared_inputs import SeenTensor
from integration.conftest import (
    PROJECTIONS,
    exact_pca,
    layer_inputs,
    lora,
    lost,
    make_llama,
    run,
    text_batches,
    vectors,
)


class Net(nn.Module):
    """Linear layers by name, called as the given function defines."""

    def __init__(self, body: Callable[[Net, Tensor], Any], *names: str, width: int = 20) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = body
        for name in names:
            self.add_module(name, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def run_and_check(model: nn.Module, batches: list[Any], names: list[str], **options: Any) -> Any:
    """Run one exact pass and compare every layer with an exact PCA of its own inputs."""
    config = lora(tau=1.0, target_modules=names)
    result = run(model, iter(batches), config, method="gram", **options)
    inputs = layer_inputs(model, batches, names)
    for name in names:
        variances, rows = exact_pca(inputs[name])
        k = len(result.components[name])
        assert lost(result.components[name], inputs[name]) < 1e-6, name
        ratio = (variances / variances.sum())[:k].float()
        torch.testing.assert_close(
            result.explained_variance_ratio[name], ratio, rtol=1e-3, atol=1e-6
        )
        assert rows.shape[1] == result.in_features[name]
    return result


def test_projections_with_one_input_are_grouped() -> None:
    result = run(make_llama(), text_batches(3), lora(), max_steps=3)
    groups = {tuple(group) for group in result.shared_inputs}
    expected = set()
    for i in (0, 1):
        layer = f"model.layers.{i}"
        expected.add(tuple(f"{layer}.self_attn.{p}" for p in PROJECTIONS[:3]))
        expected.add(tuple(f"{layer}.mlp.{p}" for p in PROJECTIONS[4:6]))
    assert groups == expected
    q, k, o = (
        result.components[f"model.layers.0.self_attn.{p}"] for p in ("q_proj", "k_proj", "o_proj")
    )
    assert torch.equal(q, k)
    assert not torch.equal(q, o)


@pytest.mark.parametrize("method", ["gram", "sketch"])
def test_layers_equal_only_on_the_first_batch_are_split(method: str) -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        is_first = x[0, 0] == 77  # marks the first batch
        return net.a(x) + net.b(x if is_first else x.flip(1))

    batches = vectors(6)
    batches[0][0, 0] = 77
    names = ["a", "b"]
    options = {"early_exit": False}
    both = run(Net(body, *names), iter(batches), lora(tau=1.0), method=method, **options)
    assert both.shared_inputs == []
    assert not torch.allclose(both.components["a"], both.components["b"], atol=1e-3)
    for name in names:
        alone = lora(tau=1.0, target_modules=[name])
        single = run(Net(body, *names), iter(batches), alone, method=method, **options)
        torch.testing.assert_close(both.singular_values[name], single.singular_values[name])
        assert torch.equal(both.components[name], single.components[name])
    if method == "gram":
        run_and_check(Net(body, *names), batches, names)


def test_one_of_three_layers_is_split_off_later() -> None:
    calls = {"n": 0}

    def body(net: Net, x: Tensor) -> Tensor:
        calls["n"] += 1
        y = x if calls["n"] % 6 in (1, 2) else x.flip(1)
        return net.a(x) + net.b(y) + net.c(x)

    names = ["a", "b", "c"]
    result = run_and_check(Net(body, *names), vectors(6), names)
    assert result.shared_inputs == [["a", "c"]]


@pytest.mark.parametrize(
    ("names", "batch", "shared"), [("abc", 0, []), ("abc", 2, [["a", "c"]]), ("ab", 2, [])]
)
def test_layers_are_split_at_a_second_call(names: str, batch: int, shared: list[list[str]]) -> None:
    """The first tensor waits for ``c``, which has not read it yet, except in the first batch."""

    def body(net: Net, x: Tensor) -> Tensor:
        y = torch.sin(3 * x)
        net.a(x), net.b(x), net.a(y)
        last = net.b(y.flip(1) if x[0, 0] == 5 else y)
        return net.c(x) + net.c(y) if "c" in names else last

    batches = vectors(4)
    batches[batch][0, 0] = 5
    result = run_and_check(Net(body, *names), batches, [*names])
    assert result.shared_inputs == shared
    assert result.tokens == 4 * 40  # also if a batch is run twice


def test_reused_memory_is_not_taken_for_a_shared_input() -> None:
    pointers = []

    def body(net: Net, x: Tensor) -> Tensor:
        for name, scale in (("a", 1.0), ("b", -2.0), ("c", 0.5)):
            y = torch.cos(x * scale)
            pointers.append(y.data_ptr())
            net.get_submodule(name)(y)
            del y
        return x

    names = ["a", "b", "c"]
    result = run_and_check(Net(body, *names), vectors(4, rows=400), names)
    assert len(set(pointers)) < len(pointers)  # otherwise the test shows nothing
    assert result.shared_inputs == []


def test_input_changed_in_place_between_layers_is_split() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = x.clone()
        net.a(y)
        y[:, :5] += torch.sin(7 * x[:, 5:10])
        net.b(y)
        net.c(y)
        return y

    names = ["a", "b", "c"]
    result = run_and_check(Net(body, *names), vectors(4), names)
    assert result.shared_inputs == [["b", "c"]]


def test_input_changed_in_place_in_inference_mode_is_split() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = x.clone()
        net.a(y)
        y[:, :5] += torch.sin(7 * x[:, 5:10])
        return net.b(y)

    with torch.inference_mode():
        result = run(Net(body, "a", "b"), vectors(4), lora(), max_steps=4)
    assert result.shared_inputs == []


def test_deferred_input_changed_in_place_warns() -> None:
    """From the second batch on, a tensor waits for all layers that shared it before."""
    calls = {"n": 0}

    def body(net: Net, x: Tensor) -> Tensor:
        calls["n"] += 1
        y = x.clone()
        net.a(y)
        if calls["n"] == 3:
            y.mul_(2)
        return net.b(y)

    batches = vectors(4)
    with pytest.warns(
        eva_kernels.EvaWarning, match=r"step \d+: .* changed the input of a.* in place"
    ):
        result = run(Net(body, "a", "b"), iter(batches), lora(tau=1.0), method="gram")
    # without its third batch, a has exactly the others
    kept = torch.cat([batches[0], batches[1], batches[3]])
    assert lost(result.components["a"], kept) < 1e-6
    doubled = torch.cat([batches[0], batches[1], 2 * batches[2], batches[3]])
    assert lost(result.components["b"], doubled) < 1e-6


def test_layer_called_several_times_is_exact() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = x
        for _ in range(3):
            y = torch.tanh(net.loop(y))
        return net.last(y)

    run_and_check(Net(body, "loop", "last"), vectors(4), ["loop", "last"])


def test_layer_called_more_often_in_later_batches_is_exact() -> None:
    """The early exit must not cut a recurrence that is longer in later batches."""

    def body(net: Net, x: Tensor) -> Tensor:
        y = x
        for _ in range(1 + int(x.shape[0]) % 3):
            y = torch.tanh(net.loop(y))
        return y

    batches = [torch.cat(vectors(1, rows=30 + i, seed=i)) for i in range(6)]
    names = ["loop"]
    model = Net(body, *names)
    config = lora(tau=1.0, target_modules=names)
    result = run(model, iter(batches[1:]), config, method="gram")
    # the first batch (31 rows) calls it twice, the second three times, the third once
    inputs = layer_inputs(model, batches[1:], names)["loop"]
    assert lost(result.components["loop"], inputs) < 1e-6


def test_layers_called_more_often_in_some_batches_are_exact() -> None:
    """All batches have one size; a layer's second call precedes the last layer's first."""

    def body(net: Net, x: Tensor) -> Tensor:
        y = torch.tanh(net.a(x))
        y = torch.tanh(net.a(y)) if x[0, 0] == 5 else y
        y = net.b(y)
        return net.b(torch.tanh(y)) if x[0, 0] in (5, 6) else y

    batches = vectors(5)
    for batch, mark in zip(batches, (0, 5, 0, 6, 0), strict=True):
        batch[0, 0] = mark
    run_and_check(Net(body, "a", "b"), batches, ["a", "b"])


def test_shared_input_and_several_calls_are_exact() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        net.once(x)
        y = torch.tanh(net.twice(x))
        return net.twice(y) + net.other(y)

    names = ["once", "twice", "other"]
    result = run_and_check(Net(body, *names), vectors(5), names)
    assert result.shared_inputs == []


def test_three_layers_called_unequally_often_are_split() -> None:
    """The input deferred for ``a`` is accumulated for the others before ``c`` is called again."""

    def body(net: Net, x: Tensor) -> Tensor:
        if x[0, 0] == 5:
            return net.b(x) + net.c(x) + net.c(x)
        return net.a(x) + net.b(x) + net.c(x)

    batches = vectors(4)
    batches[2][0, 0] = 5
    names = ["a", "b", "c"]
    result = run_and_check(Net(body, *names), batches, names, early_exit=False)
    assert result.shared_inputs == []


def test_layers_that_share_every_call_stay_grouped() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = x
        for _ in range(2):
            y = torch.tanh(net.a(y) + net.b(y))
        return y

    result = run_and_check(Net(body, "a", "b"), vectors(5), ["a", "b"])
    assert result.shared_inputs == [["a", "b"]]


def test_layer_called_in_some_batches_only_is_exact() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = torch.tanh(net.a(x))
        if x[0, 0] > 0.3:
            y = y + net.rare(x)
        return net.b(y)

    batches = vectors(8)
    calls_rare = [bool(x[0, 0] > 0.3) for x in batches]
    assert any(calls_rare)
    assert not all(calls_rare)
    names = ["a", "rare", "b"]
    run_and_check(Net(body, *names), sorted(batches, key=lambda x: -x[0, 0]), names)
    # first called late, and after every layer called before
    run_and_check(Net(body, *names), sorted(batches, key=lambda x: x[0, 0]), names)


def test_last_layer_first_called_in_a_late_batch_is_exact() -> None:
    """It is called twice, so its first call must not end the forward pass."""

    def body(net: Net, x: Tensor) -> Tensor:
        y = torch.tanh(net.a(x))
        return net.rare(torch.tanh(net.rare(y))) if x[0, 0] == 5 else y

    batches = vectors(5)
    batches[3][0, 0] = 5
    result = run_and_check(Net(body, "a", "rare"), batches, ["a", "rare"])
    assert result.uncalled == []


def test_layers_never_called_keep_the_default_and_warn() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        return net.a(x)

    model = Net(body, "a", "idle", "unused")
    with pytest.warns(
        eva_kernels.EvaWarning, match=r"2 layers were never called.*idle, unused"
    ) as w:
        model = eva_kernels.initialize(
            model, vectors(4), lora(), max_steps=4, progress=False, on_not_converged="ignore"
        )
    assert len(w) == 1
    result = model.eva_result
    assert result.uncalled == ["idle", "unused"]
    assert result.ranks == {"a": 4}
    layers = {n: model.base_model.model.get_submodule(n) for n in ("idle", "unused")}
    for layer in layers.values():
        assert layer.r["default"] == 4
        a = layer.lora_A["default"].weight
        assert a.any()
        assert not torch.allclose(a @ a.mT, torch.eye(4), atol=1e-2)
        assert not layer.lora_B["default"].weight.any()


def test_layers_called_with_keywords_and_tuples_are_read() -> None:
    class Odd(nn.Linear):
        def forward(self, hidden: Any) -> Tensor:
            return super().forward(hidden[0] if isinstance(hidden, tuple) else hidden)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Odd(20, 20), Odd(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(hidden=x), None))

    result = run(Outer(), vectors(3), lora(target_modules=["a", "b"]), max_steps=3)
    assert sum(result.ranks.values()) == 8


def test_early_exit_does_not_run_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, calls = text_batches(4), []
    results, forwards = {}, {}
    for exit_early in (True, False, "auto"):
        model = make_llama()
        calls.clear()
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        config = lora(tau=1.0, target_modules=["q_proj", "gate_proj"])
        options = {"method": "gram", "trim_padding": False, "early_exit": exit_early}
        results[exit_early] = run(model, iter(batches), config, **options)
        forwards[exit_early] = len(calls)
        assert len(model.lm_head._forward_hooks) == 1
    assert forwards == {True: 1, False: 4, "auto": 1}
    for name, rows in results[False].components.items():
        assert torch.equal(rows, results[True].components[name])
        assert torch.equal(rows, results["auto"].components[name])


@pytest.mark.parametrize("reason", ["cpu", "disk", "DeepSpeedEngine", "PipelineParallel"])
def test_early_exit_is_off_for_offloading_and_engines(reason: str) -> None:
    batches, calls = text_batches(3), []
    model = make_llama()
    if reason in ("cpu", "disk"):
        model.hf_device_map = {"": 0, "lm_head": reason}
    else:
        model.__class__ = type(reason, (type(model),), {})
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    run(model, iter(batches), lora(tau=1.0), trim_padding=False)
    assert len(calls) == 3


def test_frozen_layers_end_the_forward_earlier() -> None:
    """Nothing runs after the last layer that still accumulates."""
    calls: list[int] = []

    def body(net: Net, x: Tensor) -> Tensor:
        y = net.first(x)
        calls.append(0)
        y = net.second(0 * y + torch.tensor([1.0] + [0.0] * 19) * x[:, :1])
        return y

    def batches() -> Iterator[Tensor]:
        yield from torch.randn(8, 60, 20)

    config = lora(r=1, rho=1.0, tau=0.9999)
    run(Net(body, "first", "second"), batches(), config, freeze_converged=True, method="sketch")
    # "second" converges at once, then the pass stops at "first", before it is run
    assert 2 <= len(calls) < 8


def test_first_forward_compares_few_pairs_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Tensor] = []
    is_same = SeenTensor.is_same

    def counting(self: SeenTensor, x: Tensor) -> bool:
        compared.append(x)
        return is_same(self, x)

    def chain(net: Net, x: Tensor) -> Tensor:
        for name in names:
            x = net.get_submodule(name)(x)
        return x

    monkeypatch.setattr(SeenTensor, "is_same", counting)
    names = [f"lin{i}" for i in range(40)]
    result = run(Net(chain, *names), vectors(1), lora(target_modules=names), method="gram")
    assert result.shared_inputs == []
    assert len(compared) <= 2 * len(names)  # the id of a freed tensor may be reused

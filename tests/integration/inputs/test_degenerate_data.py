"""Degenerate data through ``initialize``: adapters are finite, orthonormal and accurate."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eva_kernels
from eva_kernels import EvaError, EvaValueError, EvaWarning
from integration.conftest import (
    QUIET,
    angle,
    exact_pca,
    lora,
    lora_layers,
    lost,
    make_llama,
    run,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)

METHODS = ["sketch", "gram"]


def two_layers(width: int = 20, out: int = 6) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, out)).eval()


def initialized(data: Any, model: nn.Module | None = None, **options: Any) -> Any:
    # tau = 1.0: no layer converges, so that every batch is used
    fields = {"target_modules": options.pop("targets", ["0", "2"]), "tau": 1.0}
    config = lora(**{**fields, **options.pop("lora", {})})
    base = two_layers() if model is None else model
    return eva_kernels.initialize(base, data, config, max_steps=6, **{**QUIET, **options})


def check_adapters(model: nn.Module) -> None:
    for name, layer in lora_layers(model).items():
        a = layer.lora_A["default"].weight.detach().double().flatten(1)
        assert a.isfinite().all(), name
        torch.testing.assert_close(
            a @ a.mT, torch.eye(len(a), dtype=a.dtype), atol=1e-5, rtol=0, msg=name
        )
        assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 3.5, -1e4])
def test_constant_inputs_get_no_rank(method: str, value: float) -> None:
    """A layer whose inputs have no variance gets rank 0; other layers are not affected."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.dead, self.live = nn.Linear(12, 4), nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.live(x) + self.dead(torch.full((len(x), 12), value))

    model = initialized(vectors(), Model(), targets=["dead", "live"], method=method)
    assert model.eva_result.ranks == {"dead": 0, "live": 8}
    check_adapters(model)


@pytest.mark.filterwarnings("ignore:only 1 of 4 ranks could be given:eva_kernels.EvaWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_inputs_are_recovered(method: str, rank: int) -> None:
    data = vectors(rank=rank)
    model = initialized(data, targets=["0"], method=method)
    result = model.eva_result
    assert result.numerical_rank["0"] == rank
    assert result.ranks["0"] <= max(rank, 1)
    assert lost(result.state_dict()["0"], torch.cat(data[:6])) < 1e-6
    check_adapters(model)


@pytest.mark.parametrize("method", METHODS)
def test_duplicated_tokens_do_not_change_the_result(method: str) -> None:
    once = vectors(6)
    twice = [torch.cat([x, x]) for x in once]
    results = [
        run(two_layers(), iter(d), lora(target_modules=["0"], tau=1.0), method=method)
        for d in (once, twice)
    ]
    assert angle(*(r.components["0"][:3] for r in results)) < 1e-3
    torch.testing.assert_close(
        *(r.explained_variance_ratio["0"] for r in results), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
def test_single_token_gives_no_rank(method: str) -> None:
    one = [vectors()[0][:1]]
    result = run(two_layers(), iter(one), lora(target_modules=["0", "2"]), method=method)
    assert (result.tokens, set(result.ranks.values())) == (1, {0})
    with pytest.raises(EvaValueError, match="no variance to explain"):
        initialized(one, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e12, 1e15])
def test_extreme_scales_of_inputs(method: str, scale: float) -> None:
    data = [x * scale for x in vectors()]
    model = initialized(data, targets=["0"], method=method)
    rows = torch.cat([x.double() for x in data[:6]])
    state = model.eva_result.state_dict()["0"]
    if len(state):
        assert lost(state, rows) < (1e-6 if method == "gram" else 5e-3)
    check_adapters(model)


def test_overflow_of_squares_in_float32_is_an_error() -> None:
    data = [x * 1e25 for x in vectors()]
    with pytest.raises(EvaError, match=r"layer 0, step 1: .*overflow.*float64"):
        initialized(data)


@pytest.mark.parametrize("method", METHODS)
def test_columns_of_very_different_scale(method: str) -> None:
    scale = 10.0 ** torch.linspace(-6, 6, 20)
    data = [x * scale for x in vectors()]
    model = initialized(data, targets=["0"], method=method)
    assert lost(model.eva_result.components["0"][:4], torch.cat(data[:6])) < 1e-6
    check_adapters(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_model_and_data(dtype: torch.dtype) -> None:
    data = [x.to(dtype) for x in vectors()]
    model = initialized(data, two_layers().to(dtype), targets=["0"], method="gram")
    assert lost(model.eva_result.components["0"], torch.cat(data[:6])) < 1e-5
    weight = lora_layers(model)["0"].lora_A["default"].weight
    assert weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("width", "r"), [(1, 4), (2, 4), (3, 8)])
def test_layers_narrower_than_the_rank(width: int, r: int) -> None:
    data = [x[:, :width] for x in vectors()]
    model = initialized(data, two_layers(width), lora={"r": r})
    assert model.eva_result.ranks["0"] <= width
    assert sum(model.eva_result.ranks.values()) <= 2 * r
    check_adapters(model)


def test_single_output_feature() -> None:
    model = initialized(vectors(), two_layers(out=1))
    check_adapters(model)


@pytest.mark.parametrize("method", METHODS)
def test_empty_batches_do_not_change_the_result(method: str) -> None:
    data = vectors(6)
    with_empty = [data[0][:0], data[0], data[1][:0], *data[1:], data[2][:0]]
    results = [
        run(two_layers(), iter(d), lora(target_modules=["0"], tau=1.0), method=method)
        for d in (data, with_empty)
    ]
    assert results[1].tokens == results[0].tokens
    assert torch.equal(results[0].components["0"], results[1].components["0"])


def test_batches_whose_mask_keeps_no_token() -> None:
    texts = text_batches(5)
    texts[1]["attention_mask"].zero_()
    texts[3]["attention_mask"].zero_()
    result = run(make_llama(), iter(texts), lora(tau=1.0))
    assert result.tokens == sum(int(b["attention_mask"].sum()) for b in texts)


def test_recurrent_layer_and_tied_weights() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.cell, self.head = nn.Linear(20, 20), nn.Linear(20, 20)
            self.head.weight = self.cell.weight

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.cell(x)) + 0.5 * x
            return self.head(x)

    model, data = Recurrent(), vectors(5)
    result = run(model, iter(data), lora(target_modules=["cell", "head"], tau=1.0), method="gram")
    rows = []
    with torch.no_grad():
        for x in data:
            for _ in range(3):
                rows.append(x)
                x = torch.tanh(model.cell(x)) + 0.5 * x
    variances, directions = exact_pca(torch.cat(rows))
    assert angle(result.components["cell"][:2], directions[:2]) < 1e-4
    ratio = (variances / variances.sum())[:8]
    torch.testing.assert_close(
        result.explained_variance_ratio["cell"].double(), ratio, rtol=1e-4, atol=1e-7
    )


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs_are_refused(layout: torch.layout) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.to_sparse() if layout == torch.sparse_coo else x.to_sparse_csr())

    with pytest.raises(EvaError, match=r"layer a, step 1: .*sparse.*prepare_layer_inputs_fn"):
        initialized(vectors(), Sparse(), targets=["a"])


def test_nested_tensors_are_refused() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged))

    with pytest.raises(EvaError, match=r"layer a, step 1: .*nested.*prepare_layer_inputs_fn"):
        initialized(vectors(), Nested(), targets=["a"])


@pytest.mark.parametrize("method", METHODS)
def test_nonfinite_tokens_are_skipped(method: str) -> None:
    data = vectors(6)
    data[2][7, 3] = float("nan")
    data[4][0] = float("inf")
    model = initialized(iter(data), targets=["0"], on_nonfinite="skip", method=method)
    good = torch.cat(data)
    good = good[good.isfinite().all(1)]
    assert model.eva_result.tokens == len(good)
    assert model.eva_result.skipped_tokens == 2
    assert lost(model.eva_result.components["0"], good) < (1e-6 if method == "gram" else 5e-3)
    check_adapters(model)


@pytest.mark.parametrize("way", ["base", "adapters"])
def test_identical_tokens_are_an_error(way: str) -> None:
    data, base = [{"input_ids": torch.full((2, 9), 5)}], make_llama()
    model: Any = base if way == "base" else wrapped(base)
    before = state_of(model)
    with pytest.raises(EvaValueError, match=r"none of the 14 layers.*no variance.*samples"):
        eva_kernels.initialize(model, data, lora() if way == "base" else None, **QUIET)
    assert same_state(before, state_of(model))


class Idle(nn.Module):
    """Uses the weight of a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.a(x), self.b.weight)


def test_uncalled_layers_are_reported() -> None:
    message = r"1 layer was never called and keeps .*: b\. .*MultiheadAttention.*exclude_modules"
    with pytest.warns(EvaWarning, match=message):
        result = run(Idle(), vectors(4), lora(target_modules=["a", "b"]), max_steps=4)
    assert result.uncalled == ["b"]
    with pytest.raises(EvaValueError, match=r"none of them was called\. .*MultiheadAttention"):
        run(Idle(), vectors(4), lora(target_modules=["b"]), max_steps=4)


def fused_forward(x: Tensor, layer: Any) -> Tensor:
    """Compute a layer and its adapter, and call neither, as fused kernels do."""
    down, up = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    return x @ (layer.get_base_layer().weight + layer.scaling["default"] * up @ down).mT


def test_layers_replaced_by_kernels_warn_and_take_base_model_results() -> None:
    config = lora(target_modules=["0", "2"], rho=1.0, tau=1.0)
    model = wrapped(two_layers(), config)
    layer = model.base_model.model[0]
    layer.forward = functools.partial(fused_forward, layer=layer)
    with pytest.warns(
        EvaWarning, match=r"1 layer was never called .*: 0\. .*kernels replace.*apply the"
    ):
        run(model, vectors(), max_steps=4)
    run(two_layers(), iter(vectors()), config, method="gram").apply(model)
    assert lost(layer.lora_A["default"].weight.detach(), torch.cat(vectors())) < 1e-5


def test_too_few_tokens_for_the_ranks_warn() -> None:
    batch = {key: value[:1, :3] for key, value in text_batches(1, padded=False)[0].items()}
    with pytest.warns(
        EvaWarning, match=r"only \d+ of 112 ranks could be given: .* \d+ tokens read"
    ):
        run(make_llama(), [batch], lora(r=8))
    result = run(make_llama(), text_batches(6), lora(r=8))  # no warning
    assert sum(result.ranks.values()) == 112
    run(make_llama(), [batch], lora(r=8), budget="params")  # where ranks differ in cost


def test_ranks_of_uncalled_layers_do_not_count_as_missing() -> None:
    model = nn.Sequential(nn.Linear(20, 4))
    model.spare = nn.ModuleList(nn.Linear(20, 4) for _ in range(3))
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    with pytest.warns(EvaWarning) as caught:
        run(model, vectors(4), lora(target_modules=["0", "1", "2"]), max_steps=4)
    assert len(caught) == 1
    assert str(caught[0].message).startswith("3 layers were never called")


def test_convergence_warning_counts_layers_sharing_an_input() -> None:
    options = {"max_steps": 1, "on_not_converged": "warn"}
    with pytest.warns(eva_kernels.NotConvergedWarning, match="^14 of 14 layers have not"):
        run(make_llama(), text_batches(1), lora(), **options)

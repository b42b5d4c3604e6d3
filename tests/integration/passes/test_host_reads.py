"""A whole pass on the way of an accelerator, taken on the CPU: results, reads, and faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from eva_kernels import EvaResult, NonFiniteError
from eva_kernels.streaming import _host
from host_reads import HostReads, counted
from integration.conftest import exact_pca, lora, make_llama, make_mlp, run, text_batches, vectors

CONFIG = {"target_modules": ["0", "2"]}
METHODS = ["sketch", "gram"]


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostReads]:
    """Let the CPU pass for an accelerator, and count what would wait for it."""
    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    with counted(monkeypatch) as seen:
        yield seen


@pytest.mark.parametrize("method", METHODS)
def test_same_result(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    for free in (True, False):
        monkeypatch.setattr(_host, "reads_are_free", lambda device, free=free: free)
        options = {"method": method, "backend": "torch"}
        passes.append(run(make_llama(), iter(text_batches(4)), lora(tau=1.0), **options))
    here, away = passes
    assert here.ranks == away.ranks
    assert (here.steps, here.tokens, here.numerical_rank) == (
        away.steps,
        away.tokens,
        away.numerical_rank,
    )
    for name, ratio in here.explained_variance_ratio.items():
        torch.testing.assert_close(away.explained_variance_ratio[name], ratio, rtol=1e-4, atol=1e-6)
    similar = [torch.tensor(p.history["similarity"][-1]) for p in passes]
    torch.testing.assert_close(*similar, rtol=0, atol=1e-3)


def test_one_read_a_step(away: HostReads) -> None:
    data = vectors(4, rows=60)
    result = run(make_mlp(), iter(data), lora(tau=1.0, **CONFIG), method="sketch", backend="torch")
    assert result.steps == 4
    assert away.waits["read"] == 4
    overlap = result.components["0"][:3].double() @ exact_pca(torch.cat(data))[1][:3].mT
    assert float(torch.linalg.svdvals(overlap).min()) > 0.99


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("away")
def test_a_fault_names_layer_and_step(value: float, method: str) -> None:
    data = vectors(4)
    data[2][5, 3] = value
    data[2][7] = value
    told = "2 of 40" if method == "gram" else "some of 40"
    with pytest.raises(
        NonFiniteError,
        match=rf'layer 0, step 3: {told} tokens hold NaN or infinity\. Look .*"skip"',
    ):
        run(make_mlp(), iter(data), lora(tau=1.0, **CONFIG), method=method, backend="torch")


@pytest.mark.usefixtures("away")
def test_bad_tokens_are_skipped() -> None:
    data = vectors(4)
    data[2][5, 3] = float("nan")
    result = run(
        make_mlp(), iter(data), lora(tau=1.0, **CONFIG), on_nonfinite="skip", backend="torch"
    )
    assert (result.skipped_tokens, result.tokens) == (1, 159)


@pytest.fixture
def at_read(away: HostReads, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many operators had run when the host began and at each read since."""
    read, counts = _host.read, [0]

    def noted(tensors: Sequence[torch.Tensor]) -> list[_host.Array]:
        arrays = read(tensors)
        if tensors:
            counts.append(away.calls.total())
        return arrays

    monkeypatch.setattr(_host, "read", noted)
    return counts


def run_chain(layers: int, method: str, seen: Callable[[], None] = lambda: None) -> EvaResult:
    """Take four steps with so many linear layers of one shape; calls ``seen`` at each forward."""
    model = torch.nn.Sequential(*(torch.nn.Linear(12, 12) for _ in range(layers))).eval()
    for linear in model:
        torch.nn.init.orthogonal_(linear.weight)  # no layer's input is of lower rank
    model[0].register_forward_pre_hook(lambda *given: seen())
    config = lora(tau=1.0, target_modules=[str(i) for i in range(layers)])
    data = iter(vectors(4, rows=60, features=12))
    return run(model, data, config, method=method, backend="torch")


def test_between_read_and_next_forward_torch_is_not_asked_layer_by_layer(
    away: HostReads, at_read: list[int]
) -> None:
    def calls(layers: int) -> int:
        between: list[int] = []
        run_chain(layers, "sketch", lambda: between.append(away.calls.total() - at_read[-1]))
        return between[-1]

    assert calls(12) == calls(3) <= 10


@pytest.mark.parametrize(("method", "reads", "most"), [("sketch", 0, 30), ("gram", 1, 80)])
def test_the_result_is_not_fetched_layer_by_layer(
    method: str, reads: int, most: int, away: HostReads, at_read: list[int]
) -> None:
    def calls(layers: int) -> int:
        del at_read[1:]
        away.waits.clear()
        result = run_chain(layers, method)
        assert (result.steps, len(result.components)) == (4, layers)
        assert away.waits["read"] == 4 + reads
        away.waits.pop("_linalg_eigh", None)  # a GPU's own launch does not wait
        assert set(away.waits) == {"read"}
        return away.calls.total() - at_read[4]

    assert calls(12) == calls(3) <= most

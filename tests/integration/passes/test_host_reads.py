"""A pass on the code path of accelerators, run on the CPU: results, host reads and errors."""

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
def accelerator_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostReads]:
    """Treat the CPU as an accelerator, and count the reads that would wait for one."""
    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    with counted(monkeypatch) as reads:
        yield reads


@pytest.mark.parametrize("method", METHODS)
def test_result_equals_that_with_free_reads(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    for free in (True, False):
        monkeypatch.setattr(_host, "reads_are_free", lambda device, free=free: free)
        options = {"method": method, "backend": "torch"}
        passes.append(run(make_llama(), iter(text_batches(4)), lora(tau=1.0), **options))
    near, there = passes
    assert near.ranks == there.ranks
    assert (near.steps, near.tokens, near.numerical_rank) == (
        there.steps,
        there.tokens,
        there.numerical_rank,
    )
    for name, ratio in near.explained_variance_ratio.items():
        torch.testing.assert_close(
            there.explained_variance_ratio[name], ratio, rtol=1e-4, atol=1e-6
        )
    similar = [torch.tensor(p.history["similarity"][-1]) for p in passes]
    torch.testing.assert_close(*similar, rtol=0, atol=1e-3)


def test_each_step_reads_once(accelerator_reads: HostReads) -> None:
    data = vectors(4, rows=60)
    result = run(make_mlp(), iter(data), lora(tau=1.0, **CONFIG), method="sketch", backend="torch")
    assert result.steps == 4
    assert accelerator_reads.waits["read"] == 4
    overlap = result.components["0"][:3].double() @ exact_pca(torch.cat(data))[1][:3].mT
    assert float(torch.linalg.svdvals(overlap).min()) > 0.99


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("accelerator_reads")
def test_non_finite_values_are_reported_with_layer_and_step(value: float, method: str) -> None:
    data = vectors(4)
    data[2][5, 3] = value
    data[2][7] = value
    count = "2 of 40" if method == "gram" else "some of 40"
    found = "NaN or infinity" + ", or numbers whose squares overflow.*" * (method == "gram")
    with pytest.raises(
        NonFiniteError,
        match=rf'layer 0, step 3: {count} tokens hold {found}\. Look .*"skip"',
    ):
        run(make_mlp(), iter(data), lora(tau=1.0, **CONFIG), method=method, backend="torch")


@pytest.mark.usefixtures("accelerator_reads")
def test_non_finite_tokens_are_skipped() -> None:
    data = vectors(4)
    data[2][5, 3] = float("nan")
    result = run(
        make_mlp(), iter(data), lora(tau=1.0, **CONFIG), on_nonfinite="skip", backend="torch"
    )
    assert (result.skipped_tokens, result.tokens) == (1, 159)


@pytest.fixture
def calls_at_reads(accelerator_reads: HostReads, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the operators run when the host started, and at each read since."""
    read, counts = _host.read, [0]

    def noted(tensors: Sequence[torch.Tensor]) -> list[_host.Array]:
        arrays = read(tensors)
        if tensors:
            counts.append(accelerator_reads.calls.total())
        return arrays

    monkeypatch.setattr(_host, "read", noted)
    return counts


def run_chain(layers: int, method: str, on_forward: Callable[[], None] = lambda: None) -> EvaResult:
    """Run four steps on equal linear layers, calling ``on_forward`` at each forward pass."""
    model = torch.nn.Sequential(*(torch.nn.Linear(12, 12) for _ in range(layers))).eval()
    for linear in model:
        torch.nn.init.orthogonal_(linear.weight)  # no layer's input is of lower rank
    model[0].register_forward_pre_hook(lambda *given: on_forward())
    config = lora(tau=1.0, target_modules=[str(i) for i in range(layers)])
    data = iter(vectors(4, rows=60, features=12))
    return run(model, data, config, method=method, backend="torch")


def test_operators_between_read_and_forward_do_not_grow_with_layers(
    accelerator_reads: HostReads, calls_at_reads: list[int]
) -> None:
    def calls(layers: int) -> int:
        between: list[int] = []
        run_chain(
            layers,
            "sketch",
            lambda: between.append(accelerator_reads.calls.total() - calls_at_reads[-1]),
        )
        return between[-1]

    assert calls(12) == calls(3) <= 10


@pytest.mark.parametrize(("method", "reads", "most"), [("sketch", 0, 30), ("gram", 1, 80)])
def test_operators_of_the_result_do_not_grow_with_layers(
    method: str, reads: int, most: int, accelerator_reads: HostReads, calls_at_reads: list[int]
) -> None:
    def calls(layers: int) -> int:
        del calls_at_reads[1:]
        accelerator_reads.waits.clear()
        result = run_chain(layers, method)
        assert (result.steps, len(result.components)) == (4, layers)
        assert accelerator_reads.waits["read"] == 4 + reads
        accelerator_reads.waits.pop("_linalg_eigh", None)  # a launch on a GPU, which does not wait
        assert set(accelerator_reads.waits) == {"read"}
        return accelerator_reads.calls.total() - calls_at_reads[4]

    assert calls(12) == calls(3) <= most

"""``SketchInto``, which relaunches known kernels by address: when it does, and when it must not."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from eva_kernels import reference
from eva_kernels.ops import SketchInto, sketch_unchecked
from eva_kernels.streaming import InputStream, Options, fold_streams
from eva_kernels.streaming import stream as streams
from helpers import BACKENDS

module = sys.modules[SketchInto.__module__]
N, Q, D = 48, 16, 32
State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def state_of(device: torch.device, d: int = D) -> State:
    generator, wide = torch.Generator().manual_seed(d), torch.float64
    basis = torch.randn(Q, d, generator=generator).to(device)
    shift = torch.zeros(d, dtype=wide, device=device)
    square = torch.zeros((), dtype=wide, device=device)
    return basis, torch.zeros(d, device=device), torch.zeros_like(basis), shift, square


def tokens(n: int = N, d: int = D, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).bfloat16()


class AddressLaunches:
    """Records address_launches by address."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[tuple[list[int], int]] = []
        self.known: dict[Any, Any] = {}
        monkeypatch.setattr(module, "_launchers", self.known)

    def register(self, x: Tensor, rows: Tensor | None, state: State) -> None:
        """Register tokens of this kind as launched before."""
        kind = module._launch_key(x, rows, module._sums_key(state[0], "auto", True))
        self.known[kind] = self, SimpleNamespace(nbytes=256)

    def __call__(self, spots: list[int], base: int) -> None:
        self.given.append((list(spots), base))


@pytest.fixture
def address_launches(monkeypatch: pytest.MonkeyPatch) -> AddressLaunches:
    return AddressLaunches(monkeypatch)


@pytest.mark.parametrize("rows", [None, torch.arange(0, N, 3)])
def test_known_kind_is_launched_by_address(rows: Tensor | None, address_launches: AddressLaunches):
    state, x, other = state_of(torch.device("cpu")), tokens(), tokens(seed=1)
    into = SketchInto(state, "auto", True)
    assert not into.add(x, rows)
    address_launches.register(x, rows, state)
    assert into.add(other, rows)
    [(spots, base)] = address_launches.given
    assert spots[0] == other.data_ptr()
    assert spots[1] == (0 if rows is None else rows.data_ptr())
    assert spots[2:] == [tensor.data_ptr() for tensor in state]
    assert base % 16 == 0


def test_unknown_kinds_are_not_launched_by_address(address_launches: AddressLaunches):
    state, x, rows = state_of(torch.device("cpu")), tokens(), torch.arange(0, N, 3)
    address_launches.register(x, None, state)
    address_launches.register(x, rows, state)
    into = SketchInto(state, "auto", True)
    wide = torch.zeros(N, D + 8, dtype=torch.bfloat16)
    kinds = {
        "more tokens": (tokens(N + 1), None),
        "another dtype": (x.half(), None),
        "other strides": (wide[:, :D], None),
        "more rows": (x, torch.arange(0, N, 2)),
        "rows of another dtype": (x, rows.int()),
        "rows with gaps": (x, torch.arange(0, 2 * N, 3)[::2]),
        "a place that is not aligned": (wide.reshape(-1)[1 : 1 + N * D].view(N, D), None),
    }
    assert [name for name, given in kinds.items() if into.add(*given)] == []
    # the features of another layer, whose kind is known
    broad = state_of(torch.device("cpu"), 2 * D)
    address_launches.register(tokens(d=2 * D), None, broad)
    assert not into.add(tokens(d=2 * D), None)
    for other in ("triton", True), ("auto", False):
        assert not SketchInto(state, *other).add(x, None)
    gaps = torch.zeros(Q, 2 * D)[:, ::2]
    assert not SketchInto((*state[:2], gaps, *state[3:]), "auto", True).add(x, None)
    assert address_launches.given == []


def test_launched_kinds_are_cached_up_to_a_limit(
    address_launches: AddressLaunches, monkeypatch: pytest.MonkeyPatch
):
    state, ran = state_of(torch.device("cpu")), []
    sequence = SimpleNamespace(nbytes=64, run=lambda *given: ran.append(given))
    sequence.relauncher = lambda device: address_launches if len(ran) > 1 else None
    monkeypatch.setattr(module, "_sequence", lambda *kind: sequence)
    monkeypatch.setattr(module, "choose_backend", lambda *given: "triton")
    monkeypatch.setattr(module, "MAX_LAUNCHERS", 2)
    into = SketchInto(state, "auto", True)
    for n, again in ((N, False), (N, True), (N + 1, True), (N + 2, True)):
        sketch_unchecked(tokens(n), state, None, "auto", True)
        assert into.add(tokens(n), None) == again
    assert len(ran) == 4
    assert len(address_launches.given) == 3
    assert not into.add(tokens(N), None)
    assert into.add(tokens(N + 2), None)


def test_adds_to_compares_all_tensors():
    state = state_of(torch.device("cpu"))
    into = SketchInto(state, "auto", True)
    assert into.adds_to(tuple(state))
    for i, tensor in enumerate(state):
        assert not into.adds_to((*state[:i], tensor.clone(), *state[i + 1 :]))


class FunctionMode(TorchFunctionMode):
    """A torch function mode that changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


def test_observed_tensors_are_not_launched_by_address(address_launches: AddressLaunches):
    state, x = state_of(torch.device("cpu")), tokens()
    address_launches.register(x, None, state)
    into = SketchInto(state, "auto", True)
    with FunctionMode():
        assert not into.add(x, None)
    assert not into.add(x.as_subclass(torch.nn.Parameter), None)
    assert address_launches.given == []
    assert into.add(x, None)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton here")
def test_second_batch_on_a_gpu_is_launched_by_address(
    address_launches: AddressLaunches, device: torch.device
):
    found = [state_of(device) for _ in range(2)]
    batches = [tokens(seed=seed).to(device) for seed in range(3)]
    chosen = torch.arange(0, N, 3, device=device)
    into = SketchInto(found[0], "triton", True)
    for rows in (None, chosen):
        for i, x in enumerate(batches):
            again = into.add(x, rows)
            assert again == (i > 0 and device.type == "cuda")
            if not again:
                sketch_unchecked(x, found[0], rows, "triton", True)
            sketch_unchecked(x, found[1], rows, "triton", True)
    assert all(map(torch.equal, *found))


class AlwaysAdding(SketchInto):
    """Always adds to the tensors that it was made for."""

    __slots__ = ()

    def add(self, x: Tensor, rows: Tensor | None) -> bool:
        reference.sketch(x, *self._state, rows)
        return True


def run_streams(seed: int) -> list[InputStream]:
    """Return streams that were merged, copied, folded and emptied."""
    generator = torch.Generator().manual_seed(seed)
    options = Options(method="sketch", backend="torch")
    first, second = (InputStream(D, 4, Q, torch.device("cpu"), options=options) for _ in range(2))

    def add(stream: InputStream, count: int) -> None:
        for _ in range(count):
            x = torch.randn(N, D, generator=generator)
            rows = torch.arange(0, N, 3) if count % 2 else None
            assert stream.add(x, rows) == (N if rows is None else len(rows))

    add(first, 3)
    fold_streams([first])
    add(first, 2)
    copy = first.clone()
    assert copy._sketcher is None  # it would hold the addresses of the first
    add(copy, 3)
    add(second, 4)
    fold_streams([second])
    first.merge(second)
    add(first, 2)
    second.drop_pending()
    add(second, 3)
    fold_streams([first, second, copy])
    lost = InputStream(D, 4, Q, torch.device("cpu"), options=options)
    add(lost, 2)
    lost.drop_pending()
    add(lost, 2)
    fold_streams([lost], final=True)
    return [first, second, copy, lost]


def test_streams_add_to_their_current_sums(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams._host, "reads_are_free", lambda device: False)
    expected_streams = run_streams(0)
    monkeypatch.setattr(streams, "SketchInto", AlwaysAdding)
    for found, expected in zip(run_streams(0), expected_streams, strict=True):
        assert found.tokens == expected.tokens
        assert found.sketch is not None
        assert expected.sketch is not None
        assert torch.equal(found.sketch.basis, expected.sketch.basis)
        assert torch.equal(found.sketch.mean, expected.sketch.mean)
        assert (found.sketch.values == expected.sketch.values).all()


@pytest.mark.parametrize("precision", ["high", "fast"])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_stream_passes_backend_and_precision_to_the_ops(
    method: str, precision: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams._host, "reads_are_free", lambda device: False)
    given_options: list[Any] = []
    high = precision == "high"
    monkeypatch.setattr(streams, "sketch_unchecked", lambda *given: given_options.append(given[3:]))
    monkeypatch.setattr(streams, "gram", lambda *given, **how: given_options.append(how))
    monkeypatch.setattr(streams, "SketchInto", lambda state, *given: given_options.append(given))
    options = Options(method, backend="torch", precision=precision)
    InputStream(D, 4, Q, torch.device("cpu"), options=options).add(torch.randn(N, D))
    exact = [{"backend": "torch", "precision": precision}]
    # the warm-up, the tokens, and the SketchInto for later ones
    expected = exact if method == "gram" else [("torch", high)] * 2
    assert given_options == [("torch", high), *expected]


@pytest.mark.parametrize("options", [{"skip_nonfinite": True}, {"check_every_add": True}])
def test_options_that_check_tokens_disable_launch_by_address(
    options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams, "SketchInto", AlwaysAdding)
    monkeypatch.setattr(streams._host, "reads_are_free", lambda device: False)
    stream = InputStream(D, 4, Q, torch.device("cpu"), options=Options(**options))
    for _ in range(2):
        stream.add(torch.randn(N, D))
    assert stream._sketcher is None

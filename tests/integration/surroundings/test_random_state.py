"""Random states are left as they were, and a pass that goes on draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eva_kernels import EvaResult
from eva_peft.surroundings.random_state import (
    preserved_random_state,
    read_random_state,
    set_random_state,
)
from integration.conftest import lora, make_mlp, run, vectors
from integration.resume.cut_short import EPOCH, same

CPU = torch.device("cpu")
DRAWS: dict[str, Callable[[torch.device], float]] = {
    "Python": lambda device: random.random(),
    "NumPy": lambda device: np.random.rand(),
    "torch": lambda device: torch.rand(()).item(),
    "device": lambda device: torch.rand((), device=device).item(),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def drawn(device: torch.device = CPU) -> list[float]:
    """Draw some numbers of each kind, of normal ones an odd number: another is kept for later."""
    normal = [random.gauss(0, 1), np.random.normal(), torch.randn(()).item()]
    return [*normal, *(draw(device) for draw in DRAWS.values())]


def test_the_state_of_an_apple_gpu_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has no function for the states of all of them, of which there is one."""
    states = [torch.tensor([7], dtype=torch.uint8)]
    found = {"is_available": lambda: True, "current_accelerator": lambda: torch.device("mps")}
    for name, answer in found.items():
        monkeypatch.setattr(torch.accelerator, name, answer)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[0].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: states.__setitem__(0, state))
    with preserved_random_state():
        states[0] = states[0] + 1
    assert states[0].tolist() == [7]


@pytest.mark.parametrize("used", ["before", "meanwhile", "never"])
def test_a_gpu_that_nobody_has_used_is_left_alone(
    used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with a CUDA context cannot be forked to use it, as notebook_launcher does."""
    generator, begun = torch.Generator().manual_seed(5), [used == "before"]

    def state() -> list[Tensor]:
        assert begun[0], "it would be initialised"
        return [generator.get_state()]

    module = SimpleNamespace(
        is_initialized=lambda: begun[0],
        default_generators=[generator],
        get_rng_state=None,
        get_rng_state_all=state,
        set_rng_state_all=lambda states: generator.set_state(states[0]),
    )
    monkeypatch.setattr(torch, "xpu", module)
    found = {"is_available": lambda: True, "current_accelerator": lambda: torch.device("xpu")}
    for name, answer in found.items():
        monkeypatch.setattr(torch.accelerator, name, answer)
    before = generator.get_state()
    with preserved_random_state():
        begun[0] = used != "never"
        torch.rand(3, generator=generator)
    assert torch.equal(generator.get_state(), before) == (used != "never")


def test_all_random_states_are_put_back() -> None:
    def states() -> list[Any]:
        _, keys, *array = np.random.get_state()
        return [random.getstate(), keys.tolist(), array, torch.get_rng_state().tolist()]

    def forward(model: Any, batch: Any) -> None:
        drawn()
        there.append(states())
        model(batch)

    model, data, there = make_mlp(), iter(vectors(1)), []
    before = states()
    run(model, data, lora(), forward_fn=forward)
    assert all(now != then for now, then in zip(there[0][2:], before[2:], strict=True))
    assert there[0][0] != before[0]
    assert states() == before


@pytest.mark.parametrize("before", [0, 1, 700])
def test_a_state_that_was_read_is_put_back(before: int, device: torch.device) -> None:
    for _ in range(before):
        drawn(device)
    state = read_random_state(device)
    assert state.dtype == torch.uint8
    assert state.dim() == 1
    first = [drawn(device) for _ in range(3)]
    set_random_state(state, device)
    assert [drawn(device) for _ in range(3)] == first


def test_another_generator_of_numpy_is_left_alone() -> None:
    was, other = np.random.get_bit_generator(), np.random.PCG64(5)
    first, known = read_random_state(CPU), drawn()
    np.random.set_bit_generator(other)
    try:
        state = read_random_state(CPU)
        np.random.rand()
        there = str(other.state)
        for one in (state, first):
            set_random_state(one, CPU)
            assert str(other.state) == there
    finally:
        np.random.set_bit_generator(was)
    np.random.seed(8)
    there = str(was.state)
    set_random_state(state, CPU)
    assert str(was.state) == there
    set_random_state(first, CPU)
    assert drawn() == known


def test_the_state_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the device of the pass; where a pass goes on elsewhere, it has the rest."""
    states = {0: torch.tensor([7] * 16, dtype=torch.uint8), 1: torch.zeros(16, dtype=torch.uint8)}
    module = SimpleNamespace(
        get_rng_state_all=list,
        get_rng_state=lambda device: states[device.index].clone(),
        set_rng_state=lambda state, device: states.__setitem__(device.index, state),
    )
    monkeypatch.setattr(torch, "xpu", module)
    first, second = torch.device("xpu", 0), torch.device("xpu", 1)
    state, known = read_random_state(first), drawn()
    assert state.numel() == read_random_state(CPU).numel() + 16
    set_random_state(state, second)
    assert states[1].tolist() == [7] * 16
    assert drawn() == known
    states[0] = states[0] + 1
    set_random_state(state, CPU)
    assert drawn() == known
    set_random_state(read_random_state(CPU), first)
    assert states[0].tolist() == [8] * 16


class Shuffled:
    """A loader whose order is drawn anew in every epoch, and what is made of each batch as well."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw, self.batches = draw, vectors(EPOCH)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in sorted(self.batches, key=lambda batch: self.draw()):
            yield batch * (1 + self.draw())


class Noisy(nn.Module):
    """A model that draws in every forward pass."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.layers, self.draw = make_mlp(), draw

    def forward(self, x: Tensor) -> Tensor:
        ways = torch.linspace(-1, 1, x.shape[1], device=x.device)
        return self.layers(x + self.draw() * ways)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("stop", [4, EPOCH, EPOCH + 2])
def test_a_pass_goes_on_with_the_numbers_of_one_without_a_break(
    stop: int, kind: str, device: torch.device, tmp_path: Path
) -> None:
    def draw() -> float:
        return DRAWS[kind](device)

    def result(seed: int, **options: Any) -> EvaResult:
        model = Noisy(draw).to(device)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return run(model, Shuffled(draw), lora(tau=1.0), method="sketch", **options)

    path = tmp_path / "state.safetensors"
    whole = result(5, max_steps=9)
    result(5, max_steps=stop, checkpoint=path)
    assert not torch.equal(
        result(6, max_steps=9).components["layers.0"], whole.components["layers.0"]
    )
    # whatever the seed of the second run
    same(result(6, max_steps=9, checkpoint=path), whole)

"""Random states are restored after a pass, and a resumed pass draws the same numbers."""

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
from integration.resume.resumed_passes import EPOCH, check_equal

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


def draw_numbers(device: torch.device = CPU) -> list[float]:
    """Draw numbers of each kind; an odd count of normal ones, so that one stays cached."""
    normal = [random.gauss(0, 1), np.random.normal(), torch.randn(()).item()]
    return [*normal, *(draw(device) for draw in DRAWS.values())]


def test_state_of_an_apple_gpu_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.mps has one state, and no function for the states of all devices."""
    states = [torch.tensor([7], dtype=torch.uint8)]
    found = {"is_available": lambda: True, "current_accelerator": lambda: torch.device("mps")}
    for name, answer in found.items():
        monkeypatch.setattr(torch.accelerator, name, answer)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[0].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: states.__setitem__(0, state))
    with preserved_random_state():
        states[0] = states[0] + 1
    assert states[0].tolist() == [7]


@pytest.mark.parametrize("used", ["before", "during", "never"])
def test_unused_gpu_is_not_initialised(used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with a CUDA context cannot fork users of CUDA, as notebook_launcher does."""
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


def test_all_random_states_are_restored() -> None:
    def states() -> list[Any]:
        _, keys, *array = np.random.get_state()
        return [random.getstate(), keys.tolist(), array, torch.get_rng_state().tolist()]

    def forward(model: Any, batch: Any) -> None:
        draw_numbers()
        during.append(states())
        model(batch)

    model, data, during = make_mlp(), iter(vectors(1)), []
    before = states()
    run(model, data, lora(), forward_fn=forward)
    assert all(now != then for now, then in zip(during[0][2:], before[2:], strict=True))
    assert during[0][0] != before[0]
    assert states() == before


@pytest.mark.parametrize("before", [0, 1, 700])
def test_state_that_was_read_is_restored(before: int, device: torch.device) -> None:
    for _ in range(before):
        draw_numbers(device)
    state = read_random_state(device)
    assert state.dtype == torch.uint8
    assert state.dim() == 1
    first = [draw_numbers(device) for _ in range(3)]
    set_random_state(state, device)
    assert [draw_numbers(device) for _ in range(3)] == first


def test_other_numpy_bit_generator_is_unchanged() -> None:
    original, other = np.random.get_bit_generator(), np.random.PCG64(5)
    first, known = read_random_state(CPU), draw_numbers()
    np.random.set_bit_generator(other)
    try:
        state = read_random_state(CPU)
        np.random.rand()
        expected_state = str(other.state)
        for one in (state, first):
            set_random_state(one, CPU)
            assert str(other.state) == expected_state
    finally:
        np.random.set_bit_generator(original)
    np.random.seed(8)
    expected_state = str(original.state)
    set_random_state(state, CPU)
    assert str(original.state) == expected_state
    set_random_state(first, CPU)
    assert draw_numbers() == known


def test_state_contains_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that resumes on a CPU restores the states of the CPU only."""
    states = {0: torch.tensor([7] * 16, dtype=torch.uint8), 1: torch.zeros(16, dtype=torch.uint8)}
    module = SimpleNamespace(
        get_rng_state_all=list,
        get_rng_state=lambda device: states[device.index].clone(),
        set_rng_state=lambda state, device: states.__setitem__(device.index, state),
    )
    monkeypatch.setattr(torch, "xpu", module)
    first, second = torch.device("xpu", 0), torch.device("xpu", 1)
    state, known = read_random_state(first), draw_numbers()
    assert state.numel() == read_random_state(CPU).numel() + 16
    set_random_state(state, second)
    assert states[1].tolist() == [7] * 16
    assert draw_numbers() == known
    states[0] = states[0] + 1
    set_random_state(state, CPU)
    assert draw_numbers() == known
    set_random_state(read_random_state(CPU), first)
    assert states[0].tolist() == [8] * 16


class Shuffled:
    """A loader that draws its order in every epoch, and a factor for each batch."""

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
def test_resumed_pass_draws_the_numbers_of_an_uninterrupted_one(
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
    # regardless of the seed of the second run
    check_equal(result(6, max_steps=9, checkpoint=path), whole)

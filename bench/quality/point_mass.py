"""A tiny vectorised environment: a point mass in the plane, driven to a goal by a force."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HORIZON = 20
STATE, ACTION = 6, 2
Trajectories = dict[str, Tensor]


@dataclass(frozen=True)
class World:
    """The dynamics: ``v <- (1 - drag) v + 0.3 force R(angle) a``, ``x <- x + 0.3 v``.

    Attributes:
        angle: by which an action is rotated before it acts, radians.
        force: of an action of length one.
        drag: share of the velocity lost in each step.
    """

    angle: float = 0.0
    force: float = 1.0
    drag: float = 0.2

    def _rotation(self, angle: float) -> Tensor:
        cos, sin = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
        return torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])

    def begin(self, count: int, generator: torch.Generator) -> Tensor:
        """Return initial states (count, 6): position, velocity (zero), goal."""
        positions = 2 * torch.rand(count, 4, generator=generator) - 1
        return torch.cat([positions[:, :2], torch.zeros(count, 2), positions[:, 2:]], 1)

    def step(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next states, and the rewards (count,): the negative distance to the goal."""
        position, velocity, goal = states.split(2, 1)
        force = self.force * actions.clamp(-1, 1) @ self._rotation(self.angle).T
        velocity = (1 - self.drag) * velocity + 0.3 * force
        position = position + 0.3 * velocity
        return torch.cat([position, velocity, goal], 1), -(position - goal).norm(dim=1)

    def expert(self, states: Tensor) -> Tensor:
        """Return the actions of a controller that knows the dynamics, (count, 2) in [-1, 1]."""
        position, velocity, goal = states.split(2, 1)
        wanted_force = (4.0 * (goal - position) - 3.0 * velocity) / self.force
        return (wanted_force @ self._rotation(-self.angle).T).clamp(-1, 1)


def play(
    world: World, states: Tensor, act: Callable[[Tensor, Trajectories], Tensor]
) -> Trajectories:
    """Run all episodes at once.

    Args:
        world: the dynamics.
        states: initial states, (count, 6).
        act: ``f(states, so_far)`` returns actions (count, 2).

    Returns:
        ``states`` (count, HORIZON, 6), ``actions`` (.., 2), ``rewards`` (.., 1).
    """
    steps: dict[str, list[Tensor]] = {"states": [], "actions": [], "rewards": []}
    for _ in range(HORIZON):
        so_far = {key: torch.stack(value, 1) for key, value in steps.items() if value}
        actions = act(states, so_far)
        next_states, rewards = world.step(states, actions)
        for key, value in zip(steps, (states, actions, rewards[:, None]), strict=True):
            steps[key].append(value)
        states = next_states
    return {key: torch.stack(value, 1) for key, value in steps.items()}


def record(world: World, count: int, seed: int) -> Trajectories:
    """Record episodes of the expert, each with its own noise level."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.4 * torch.rand(count, 1, generator=generator)

    def act(states: Tensor, so_far: Trajectories) -> Tensor:
        drawn = torch.randn(count, ACTION, generator=generator)
        return (world.expert(states) + noise * drawn).clamp(-1, 1)

    return play(world, world.begin(count, generator), act)


def returns(trajectories: Trajectories) -> Tensor:
    """Return the sums of rewards, (count,)."""
    return trajectories["rewards"].sum((1, 2))

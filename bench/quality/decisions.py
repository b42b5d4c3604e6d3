"""Decision making: a Decision Transformer on a point mass, adapted to other dynamics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DecisionTransformerConfig, DecisionTransformerModel
from transformers.pytorch_utils import Conv1D

from ..methods import Batch
from . import hub, point_mass
from .descent import descend
from .domain import Domain, Recipe, Task, linear_layers, samples_task
from .point_mass import HORIZON, Trajectories, World
from .understanding import Output

CONTEXT = 8
OLD_WORLD, NEW_WORLD = World(), World(angle=2.0, force=0.8, drag=0.3)
RECIPE = Recipe(
    title="Decision making",
    what=(
        "A Decision Transformer (3 layers, width 64, its layers of the kind Conv1D written as "
        "linear ones) that the harness pre-trains on trajectories of a noisy expert who drives a "
        "point mass to a goal, adapted to trajectories under other dynamics (forces turned by two "
        "radians, weaker, more drag). Old task: the dynamics of the pre-training."
    ),
    loss="squared error of actions",
    score="normalised return (0 random, 1 expert)",
    old="squared error and normalised return under the old dynamics",
    steps=40,
    every=8,
    batch=32,
    r=4,
    calibration=8,
)
PRETRAINING = {"steps": 300, "batch": 32, "rate": 2e-3}


class Policy(nn.Module):
    """A Decision Transformer that also returns a loss: the squared error of the actions."""

    def __init__(self, state: int, action: int, longest: int) -> None:
        super().__init__()
        config = DecisionTransformerConfig(
            state_dim=state,
            act_dim=action,
            hidden_size=64,
            n_layer=3,
            n_head=2,
            max_ep_len=longest,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        self.transformer = as_linear(DecisionTransformerModel(config))

    def forward(self, labels: Tensor | None = None, **trajectories: Tensor) -> Output:
        """Return predicted actions (batch, steps, A) as logits; labels are the actions taken."""
        actions = self.transformer(**trajectories).action_preds
        loss = None if labels is None else nn.functional.mse_loss(actions, labels)
        return Output(loss=loss, logits=actions)


def build(data: str = "embedded", seed: int = 0) -> Domain:
    """Build the domain.

    With ``data="hub"`` old and new trajectories are those of ``hub.TRAJECTORIES``; as there is no
    environment, the score is then the explained share of the actions' variance.
    """
    if data == "hub":
        old, new = hub.trajectories()
        train, validation, test = (windows(part) for part in hub.split_7_1_2(new))
        old_train, old_test, _ = (windows(part) for part in hub.split_7_1_2(old))
        tasks = [imitation_task(part) for part in (validation, test, old_test)]
    else:
        train, old_train = (
            windows(point_mass.record(world, count, seed + i))
            for i, (world, count) in enumerate([(NEW_WORLD, 100), (OLD_WORLD, 500)])
        )
        tasks = [
            driving_task(world, count, 1000 + seed + i)
            for i, (world, count) in enumerate([(NEW_WORLD, 48), (NEW_WORLD, 96), (OLD_WORLD, 96)])
        ]
    base = pretrain_base(old_train, seed)
    return Domain(
        recipe=RECIPE,
        base=base,
        targets=linear_layers(
            base, without=[f"transformer.{name}" for name in ("embed_", "predict_")]
        ),
        train=train,
        validation=tasks[0],
        test=tasks[1],
        old=tasks[2],
    )


def windows(trajectories: Trajectories) -> Batch:
    """Cut trajectories into windows of CONTEXT steps; tensors (windows, CONTEXT, ...)."""
    steps = trajectories["rewards"].shape[1]
    to_go = trajectories["rewards"].flip(1).cumsum(1).flip(1)
    times = torch.arange(steps).expand(len(to_go), steps)[..., None]
    fields = {
        **trajectories,
        "returns_to_go": to_go,
        "timesteps": times,
        "labels": trajectories["actions"],
    }
    batch = {}
    for key, value in fields.items():
        pieces = value.unfold(1, CONTEXT, CONTEXT // 2).transpose(2, 3)
        batch[key] = pieces.reshape(-1, CONTEXT, value.shape[-1])
    batch["timesteps"] = batch["timesteps"][..., 0]
    return batch


def action_error(output: Any, part: Batch) -> Tensor:
    """Return the mean squared error of the actions, (windows,)."""
    return (output.logits - part["labels"]).square().mean((1, 2))


def imitation_task(batch: Batch) -> Task:
    """Return the task to predict actions: squared error, share of the variance explained."""
    variance = float(batch["labels"].var(correction=0))
    return samples_task(
        batch, 128, action_error, lambda output, part: 1 - action_error(output, part) / variance
    )


def driving_task(world: World, count: int, seed: int) -> Task:
    """Return the task to act in a world: error on new trajectories, return in new episodes."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    initial_states = world.begin(count, generator)
    actions = 2 * torch.rand(HORIZON, count, point_mass.ACTION, generator=generator) - 1
    steps = iter(actions)
    random_return = point_mass.returns(
        point_mass.play(world, initial_states, lambda s, _: next(steps))
    ).mean()
    expert_returns = point_mass.returns(
        point_mass.play(world, initial_states, lambda s, _: world.expert(s))
    )

    imitation = imitation_task(windows(point_mass.record(world, count, seed)))

    def loss_and_score(model: nn.Module) -> tuple[float, float]:
        model_return = point_mass.returns(
            point_mass.play(world, initial_states, _model_policy(model, expert_returns))
        ).mean()
        return imitation.loss(model), float(
            (model_return - random_return) / (expert_returns.mean() - random_return)
        )

    return Task(imitation.loss, loss_and_score)


def _model_policy(model: nn.Module, target_return: Tensor) -> Any:
    """Return the policy as ``play`` takes it, conditioned on the expert's return, (count,)."""

    @torch.no_grad()
    def act(states: Tensor, so_far: Trajectories) -> Tensor:
        training = model.training
        model.eval()
        current = {"states": states[:, None], "actions": states.new_zeros(len(states), 1, 2)}
        current["rewards"] = states.new_zeros(len(states), 1, 1)
        history = {k: torch.cat([so_far[k], v], 1) if so_far else v for k, v in current.items()}
        num_steps = history["rewards"].shape[1]
        received = history["rewards"].cumsum(1) - history["rewards"]
        history["returns_to_go"] = target_return[:, None, None] - received
        history["timesteps"] = torch.arange(num_steps).expand(len(states), num_steps)
        context = {key: value[:, -CONTEXT:] for key, value in history.items()}
        actions: Tensor = model(**context).logits[:, -1]
        model.train(training)
        return actions

    return act


def pretrain_base(train: Batch, seed: int) -> nn.Module:
    """Train the base on the old trajectories."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        longest = int(train["timesteps"].max()) + 1
        model = Policy(train["states"].shape[-1], train["actions"].shape[-1], longest)
        descend(model, train, seed=seed, **PRETRAINING)  # type: ignore[arg-type]
    return model.eval()


def as_linear(model: nn.Module) -> nn.Module:
    """Replace Conv1D layers by equivalent linear layers.

    The formulas of some methods assume weights (out, in), and would fail or be wrong on (in, out).
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data.copy_(child.weight.T)
                linear.bias.data.copy_(child.bias)
                setattr(parent, name, linear)
    return model

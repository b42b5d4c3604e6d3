"""The initialisers of the benchmarks against their definitions, and the meter."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.files import ROOT
from bench.meter import Meter
from bench.methods import METHODS, Job, after_step, lora_layers, rank_of
from bench.processes import ALLOCATOR
from extras import needs_of

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# These subtract from the base weights what they put into the adapter.
CHANGE_BASE = {
    "pissa",
    "pissa-niter",
    "milora",
    "olora",
    "lora-ga",
    "lora-ga-paper",
    "corda-ipm",
    "corda-kpm",
}


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1, 65).float()
    ids = torch.multinomial(share, count * 4 * 24, True, generator=generator).view(count, 4, 24)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    value: Tensor = model(**batch).loss
    return value


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


def job(**fields: object) -> Job:
    return Job(PROJECTIONS, batches(), loss, **{"r": 4, "max_forwards": 6, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_method_keeps_the_outputs_of_the_model(name: str, base: nn.Module) -> None:
    needs_of(name)
    model, data, method = copy.deepcopy(base), batches(), METHODS[name]
    with torch.no_grad():
        before = model(**data[0]).logits
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    random, meter = torch.get_rng_state(), Meter()
    adapted = method.start(model, job(), meter).eval()
    if name not in ("lora-ga", "lora-ga-paper", "eva-peft", "pissa-niter"):
        assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():  # the initialised model must compute the same as the base
        torch.testing.assert_close(adapted(**data[0]).logits, before, atol=2e-5, rtol=0)
    layers = lora_layers(adapted)
    assert len(layers) == 14
    changed = [
        n
        for n, layer in layers.items()
        if not torch.equal(
            layer.get_base_layer().weight, weights[n.removeprefix("base_model.model.") + ".weight"]
        )
    ]
    assert len(changed) == (14 if name in CHANGE_BASE else 0)
    ranks = [rank_of(layer) for layer in layers.values()]
    assert sum(ranks) == 14 * (6 if name == "adalora" else 4)
    assert bool(meter.forwards) == method.reads_data
    assert meter.tokens == meter.forwards * 24 * (1 if method.one_sample else 4)
    assert set(meter.seconds) <= {"collect", "solve", "apply"}
    assert min(meter.seconds.values()) >= 0
    assert ("collect" in meter.seconds) == method.reads_data


@pytest.mark.parametrize("name", METHODS)
def test_training_reduces_the_loss(name: str, base: nn.Module) -> None:
    needs_of(name)
    model = METHODS[name].start(copy.deepcopy(base), job(), Meter()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(1, 9):
        value = loss(model, batches(1)[0])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        after_step(model, step)
        losses.append(value.item())
    assert losses[-1] < losses[0]


def test_start_depends_on_the_seed(base: nn.Module) -> None:
    def rows(name: str, seed: int) -> Tensor:
        model = METHODS[name].start(copy.deepcopy(base), job(seed=seed), Meter())
        return next(iter(lora_layers(model).values())).lora_A["default"].weight

    for name in ("lora", "orthonormal"):
        assert torch.equal(rows(name, 1), rows(name, 1))
        assert not torch.equal(rows(name, 1), rows(name, 2))
    a = rows("orthonormal", 1)
    torch.testing.assert_close(a @ a.mT, torch.eye(4), atol=1e-5, rtol=0)


def test_both_forms_of_lora_ga(base: nn.Module) -> None:
    """By the paper, the rows of both matrices are orthogonal and of equal length."""
    found = {}
    for name in ("lora-ga", "lora-ga-paper"):
        model = METHODS[name].start(copy.deepcopy(base), job(), Meter())
        layer = lora_layers(model)["base_model.model.model.layers.0.mlp.gate_proj"]
        found[name] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a, b = found["lora-ga-paper"]
    length = 48**0.5 / 16
    torch.testing.assert_close(a @ a.mT, length * torch.eye(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(b.mT @ b, length * torch.eye(4), atol=1e-4, rtol=0)
    assert found["lora-ga"][1].norm() < 0.2 * b.norm()


def test_milora_takes_the_smallest_singular_values(base: nn.Module) -> None:
    model = METHODS["milora"].start(copy.deepcopy(base), job(), Meter())
    layer = lora_layers(model)["base_model.model.model.layers.0.mlp.up_proj"]
    taken = layer.get_delta_weight("default")
    weight = layer.get_base_layer().weight + taken
    expected = torch.linalg.svdvals(weight)[-4:]
    torch.testing.assert_close(torch.linalg.svdvals(taken)[:4], expected, atol=1e-5, rtol=1e-4)


METER = """
import time
import torch
from bench.meter import Meter

meter = Meter()
with meter.phase("outer"):
    time.sleep(0.02)
    with meter.phase("inner"):
        block = torch.ones(16 << 20)  # 64 MiB
        time.sleep(0.2)
    assert block.numel()
    del block
assert 0.02 <= meter.seconds["outer"] < 0.2 <= meter.seconds["inner"] < 1.0, meter.seconds
assert 60 << 20 < meter.peaks["inner"] < 100 << 20, meter.peaks
with meter.phase("after"):
    pass
assert meter.peaks["after"] < 32 << 20, meter.peaks
assert meter.peak == max(meter.peaks.values())
meter.move_seconds("inner", "solve", 0.01)
assert meter.seconds["solve"] == 0.01
"""


def test_meter_measures_time_and_memory() -> None:
    # in a new process, since memory of other tests might be freed during the measurement
    environment = {**os.environ, **ALLOCATOR}
    command = [sys.executable, "-c", METER]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_failing_phase_is_measured() -> None:
    meter = Meter()
    with pytest.raises(KeyError), meter.phase("a"):
        raise KeyError
    with meter.phase("b"):
        pass
    assert set(meter.seconds) == {"a", "b"}

"""Peak memory of the initialisation at full model size, simulated with fake tensors."""

import json
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from bench import fake_cuda
from bench.common import RESULTS
from bench.models import MODELS, TARGETS
from bench.simulated_memory import (
    GIB,
    HEADERS,
    Peak,
    Simulation,
    lora_config,
    rows_for_table,
)
from eva_peft import estimate
from eva_peft.lora.wrapping import wrap_model

# What the initialisation of Llama-2-7B may take above a plain forward pass.
BOUND = int(0.40 * GIB)


def llama(layers: int) -> Simulation:
    """Return a pass of one step over the first layers of Llama-2-7B."""
    config = MODELS["Llama-2-7B"]()
    config.num_hidden_layers = layers
    return Simulation(config, forwards=1)


def overhead(
    simulation: Simulation, change: Callable[[Simulation, nn.Module], dict[str, object]]
) -> int:
    """Return the bytes of a pass above the plain forward pass, after a deliberate defect."""
    with simulation.running():
        base = simulation.base_model()
        plain = simulation.plain(base)
        model = wrap_model(base, lora_config(), "default")
        return simulation.calibrate(model, **change(simulation, model)).bytes - plain.bytes


@pytest.fixture(scope="module")
def llama_7b() -> tuple[Peak, Peak, Simulation]:
    """Return plain forward and initialisation of Llama-2-7B."""
    simulation = Simulation(MODELS["Llama-2-7B"](), forwards=2)
    with simulation.running():
        base = simulation.base_model()
        plain = simulation.plain(base)
        ours = simulation.initialize(wrap_model(base, lora_config(), "default"))
    return plain, ours, simulation


@pytest.mark.slow
def test_llama_2_7b_takes_less_than_the_bound(llama_7b: tuple[Peak, Peak, Simulation]) -> None:
    plain, ours, simulation = llama_7b
    assert 0 < ours.bytes - plain.bytes <= BOUND
    assert set(ours.phases) == {"forward 1", "forward 2", "accumulate", "fold", "result", "write"}
    # Anything else held from batch to batch would make the second larger.
    assert simulation.state_bytes[0] == simulation.state_bytes[1]
    assert simulation.state_bytes[0] == pytest.approx(simulation.planned, rel=1e-3)


@pytest.mark.slow
def test_committed_numbers_are_reproduced(
    llama_7b: tuple[Peak, Peak, Simulation],
) -> None:
    record = json.loads((RESULTS / "simulated_memory.json").read_text())
    row = next(row for row in record["rows"] if row["model"] == "Llama-2-7B")
    plain, ours, simulation = llama_7b
    assert row["plain"]["bytes"] == pytest.approx(plain.bytes, rel=0.01)
    assert row["ours"]["bytes"] == pytest.approx(ours.bytes, rel=0.01)
    assert row["state_bytes"] == pytest.approx(simulation.state_bytes[-1], rel=0.01)
    for phase, peak in ours.phases.items():
        assert row["ours"]["phases"][phase] == pytest.approx(peak, rel=0.01)
    assert [line[0] for line in rows_for_table(record)] == list(MODELS)
    assert {len(line) for line in rows_for_table(record)} == {len(HEADERS)}


def test_hooks_that_keep_inputs_exceed_the_bound() -> None:
    kept: list[Tensor] = []

    def keep(simulation: Simulation, model: nn.Module) -> dict[str, object]:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        return {}

    # five of 32 blocks already exceed it
    assert overhead(llama(5), keep) > BOUND
    assert len(kept) == 7 * 5


def test_enabled_cache_exceeds_the_bound() -> None:
    def cache(simulation: Simulation, model: nn.Module) -> dict[str, object]:
        return {"batch": {**simulation.batch(), "use_cache": True}}

    assert overhead(llama(10), cache) > BOUND


@pytest.mark.parametrize("cycle", [False, True])
def test_state_is_freed_when_the_pass_ends(cycle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if cycle:  # reference cycle: the parts of a pass refer to it
        module = import_module("eva_peft.calibrate")
        monkeypatch.setattr(module, "weakref", SimpleNamespace(proxy=lambda x: x))
    simulation = llama(2)
    with simulation.running():
        model = wrap_model(simulation.base_model(), lora_config(), "default")
        before = simulation.memory.live
        simulation.calibrate(model)
        left = simulation.memory.live - before
    state = simulation.state_bytes[-1]
    assert state > 0
    assert left == (state if cycle else 0)


@pytest.mark.parametrize(
    ("method", "layers", "features", "phase", "loose"),
    # an eigendecomposition allocates memory within its operator
    [("sketch", 24, 512, "fold", 1.3), ("gram", 2, 2048, "forward 2 > result", 1.8)],
)
def test_peak_memory_is_within_the_estimate(
    method: str, layers: int, features: int, phase: str, loose: float
) -> None:
    config = MODELS["Llama-2-7B"]()
    config.num_hidden_layers, config.vocab_size = layers, 512
    config.hidden_size, config.intermediate_size = 256, features
    config.num_attention_heads = config.num_key_value_heads = 4
    simulation = Simulation(config, (1, 64), forwards=2)
    config_of_one_target = lora_config()
    config_of_one_target.target_modules = {"down_proj"}  # no two of these layers share an input
    with simulation.running():
        model = wrap_model(simulation.base_model(), config_of_one_target, "default")
        expected = estimate(model, batch_shape=simulation.shape, method=method)
        peak = simulation.initialize(model, method=method)
    assert simulation.state_bytes[-1] == pytest.approx(expected.state_bytes, rel=0.01)
    assert peak.where == phase
    assert peak.bytes <= expected.peak_bytes <= loose * peak.bytes


def test_live_memory_counts_each_storage_once() -> None:
    fake_cuda.enable()
    memory = fake_cuda.LiveMemory()
    with FakeTensorMode(), memory:
        x = torch.empty(1000, device="cuda")  # 4000 bytes, and 96 to a multiple of 512
        assert memory.live == 4096
        views = x.view(10, 100)[2:], x.detach()
        torch.empty(1000)
        assert memory.live == 4096
        with memory.running("a"):
            y = x + 1
        del y
        assert (memory.live, memory.peak, memory.where) == (4096, 8192, ("a",))
        memory.reset_peak()
        assert (memory.peak, memory.peak_of) == (4096, {})
        x.resize_(0)
        del x, views
        assert memory.live == 0


def test_plain_forward_memory_equals_that_of_mem_tracker() -> None:
    config = MODELS["Llama-3.1-8B"]()
    config.num_hidden_layers = 2
    simulation = Simulation(config)
    with simulation.running():
        model = simulation.base_model()
        ours, parameters = simulation.plain(model).bytes, simulation.memory.live
    with FakeTensorMode(), torch.no_grad():
        model = simulation.base_model()
        tokens = simulation.batch()["input_ids"].to("cuda")
        tracker = MemTracker()
        tracker.track_external(model, tokens)
        with tracker:
            model(input_ids=tokens, use_cache=False)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cuda:0")]
    assert peak["Total"] == ours + parameters

"""Peak memory of the initialisation of 7B to 70B models, simulated without a GPU.

The package's own code runs, from ``initialize`` down to the operators, on a PEFT model of fake
CUDA tensors (``fake_cuda``): transformers' forward, the hooks, the fused sketch by its registered
operator and workspace, fold, comparison, the result, and the writing of the adapters. Only code
that needs tensor values is replaced: host reads (plausible numbers; nothing converges, so that no
step is skipped), the random first basis, uploads, random state, and the ranks (a quarter of each
layer's budget moves to another, so that layers are rebuilt). Launch parameters are for an H100.

The numbers are live bytes of tensors, each rounded up to 512, as ``torch.cuda.memory_allocated``
counts them. Not counted are the CUDA context, the allocator's fragmentation, workspaces of cuBLAS
and cuSOLVER, tables of a few kB that native code uploads, and temporaries inside a single
operator. Attention is a fused kernel for every model (without the cap of Gemma's scores); no
sample is padded, so there is no attention mask. The base model is bfloat16; PEFT keeps its adapters
in float32, and they count as parameters.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import torch
from peft import EvaConfig, LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from eva_kernels.kernels import launch
from eva_kernels.ops.sketch import sketch_workspace_bytes
from eva_kernels.streaming import _host, state
from eva_peft import calibrate, estimate, initialize
from eva_peft.inputs import prepare
from eva_peft.lora.wrapping import wrap_model

from . import fake_cuda
from .common import save
from .fake_cuda import LiveMemory
from .models import MODELS, TARGETS

GIB = 2**30
BATCH, LENGTH, FORWARDS = 4, 512, 3
RANK, RHO = 16, 2.0

# Name of a phase of the initialisation, and of the function that it is.
PHASES = {
    "forward": "forward",
    "accumulate": "add",
    "fold": "begin_fold",
    "compare": "compare_streams",
    "result": "collect_result",
    "write": "write_result",
}


@dataclass(frozen=True)
class Peak:
    """The most memory of a run, in bytes above what was live before it.

    Attributes:
        bytes: how much.
        where: what was running, the phase and the innermost module.
        phases: the peak of every phase.
    """

    bytes: int
    where: str
    phases: dict[str, int]


@dataclass
class Row:
    """The simulated memory of one model, in bytes.

    Attributes:
        model: name.
        base_bytes, adapter_bytes: parameters and buffers.
        plain: a forward pass of the base model, with logits, without a cache.
        cached: the same with the cache for generation.
        full: the calibration pass with ``early_exit=False``.
        ours: the whole ``initialize`` with its defaults.
        state_bytes: live after a step: state and sums.
        planned_state_bytes: the same by the formula that plans use, without rounding.
        workspace_bytes: the largest of the sketch kernels.
        left_bytes: live after ``initialize`` above the parameters and before a garbage collection.
        estimate_bytes: what ``eva_kernels.estimate`` tells beforehand.
    """

    model: str
    base_bytes: int
    adapter_bytes: int
    plain: Peak
    cached: Peak
    full: Peak
    ours: Peak
    state_bytes: int
    planned_state_bytes: int
    workspace_bytes: int
    left_bytes: int
    estimate_bytes: int

    @property
    def overhead(self) -> int:
        """Peak of ``initialize`` above that of the plain forward pass."""
        return self.ours.bytes - self.plain.bytes


class Simulation:
    """One model on the fake device.

    Args:
        config: of a transformers model with the seven usual projections.
        shape: (samples, tokens) of a batch.
        forwards: of the pass; each is a step. Stopping early begins with the second.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        shape: tuple[int, int] = (BATCH, LENGTH),
        forwards: int = FORWARDS,
    ) -> None:
        fake_cuda.enable()
        self.config, self.shape, self.forwards = config, shape, forwards
        self.memory = LiveMemory()
        self.state_bytes: list[int] = []
        self.planned = 0

    @contextmanager
    def running(self) -> Iterator[Simulation]:
        """Enter the simulated world."""
        # Without the collector, what waits for it counts as live, and every run counts the same.
        gc.disable()
        try:
            with (
                FakeTensorMode(allow_non_fake_inputs=True),
                _device_code_replaced(self),
                self.memory,
            ):
                yield self
        finally:
            gc.enable()
            gc.collect()

    def base_model(self) -> nn.Module:
        """Return the base model, bfloat16, in eval mode."""
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.bfloat16, attn_implementation=fake_cuda.ATTENTION
            )
        self.memory.track_modules(model)
        return model.eval()

    def batch(self) -> dict[str, Tensor]:
        """Return a batch without padding, on the CPU."""
        return {"input_ids": torch.zeros(self.shape, dtype=torch.long)}

    def measure_peak(self, run: Callable[[], Any]) -> Peak:
        """Run, and return the peak above the level before."""
        gc.collect()
        self.memory.reset_peak()
        before = self.memory.live
        run()
        peaks = {name: peak - before for name, peak in self.memory.peak_of.items()}
        phases = {name: peak for name, peak in peaks.items() if name.partition(" ")[0] in PHASES}
        where = self.memory.where
        place = " > ".join(dict.fromkeys([*where[:1], *where[-1:]]))
        return Peak(self.memory.peak - before, place, phases)

    def plain(self, model: nn.Module, use_cache: bool = False) -> Peak:
        """Measure a forward pass with logits."""

        @torch.no_grad()
        def run() -> None:
            model(input_ids=self.batch()["input_ids"].to("cuda"), use_cache=use_cache)

        return self.measure_peak(run)

    def initialize(self, model: nn.Module, **options: Any) -> Peak:
        """Measure ``initialize`` on a PEFT model."""
        return self.measure_peak(lambda: self._run(initialize, model, options))

    def calibrate(self, model: nn.Module, **options: Any) -> Peak:
        """Measure ``calibrate``, the pass without the writing, on a PEFT model."""
        return self.measure_peak(lambda: self._run(calibrate, model, options))

    def _run(self, function: Callable[..., Any], model: nn.Module, options: dict[str, Any]) -> None:
        batch = options.pop("batch", None) or self.batch()
        self.state_bytes.clear()
        before = self.memory.live
        result = function(
            model,
            [batch],
            backend="triton",
            max_steps=self.forwards,
            on_not_converged="ignore",
            progress=False,
            callback=lambda _: self.state_bytes.append(self.memory.live - before),
            **options,
        )
        eva_result = getattr(result, "eva_result", result)
        if eva_result.steps != self.forwards or any(eva_result.converged.values()):
            raise RuntimeError(
                f"expected {self.forwards} steps, but {eva_result.steps} were simulated"
            )


def lora_config() -> LoraConfig:
    """Return r = 16 and rho = 2 on the seven projections."""
    return LoraConfig(
        r=RANK, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=RHO)
    )


def simulate(name: str, config: PretrainedConfig) -> Row:
    """Simulate one model."""
    simulation = Simulation(config)
    with simulation.running():
        memory = simulation.memory
        base = simulation.base_model()
        base_bytes = memory.live
        plain, cached = simulation.plain(base), simulation.plain(base, use_cache=True)
        model = wrap_model(base, lora_config(), "default")
        gc.collect()
        parameters = memory.live
        estimated = estimate(model, batch_shape=simulation.shape)
        full = simulation.calibrate(model, early_exit=False)
        ours = simulation.initialize(model)
        bytes_after = memory.live
        features = {m.in_features for m in base.modules() if isinstance(m, nn.Linear)}
        gc.collect()
        return Row(
            model=name,
            base_bytes=base_bytes,
            adapter_bytes=parameters - base_bytes,
            plain=plain,
            cached=cached,
            full=full,
            ours=ours,
            state_bytes=max(simulation.state_bytes),
            planned_state_bytes=simulation.planned,
            workspace_bytes=max(_workspace_bytes(d) for d in features),
            left_bytes=bytes_after - memory.live,
            estimate_bytes=estimated.peak_bytes,
        )


def _workspace_bytes(features: int) -> int:
    width = 2 * round(RANK * RHO)
    device = torch.device("cuda")
    return sketch_workspace_bytes(BATCH * LENGTH, width, features, torch.bfloat16, device)


@contextmanager
def _device_code_replaced(simulation: Simulation) -> Iterator[None]:
    """Replace what needs contents or a driver, and name the phases."""
    memory = simulation.memory
    # the package's attributes of these names are its public functions
    calibrate_module, initialize_module, adapters_module, ranks_module = (
        import_module(f"eva_peft.{name}")
        for name in ("calibrate", "initialize", "lora.adapters", "passes.ranks")
    )

    @contextmanager
    def null_context() -> Iterator[None]:
        yield

    def upload(host: Tensor, device: torch.device) -> Tensor:
        return torch.empty(host.shape, dtype=host.dtype, device=device)

    def random_basis(rows: int, features: int, seed: int) -> Tensor:
        return torch.empty(rows, features, dtype=torch.float64)

    collect_original = calibrate_module.collect_result

    def collect_result(run: Any, peak_bytes: int) -> Any:
        simulation.planned = sum(slot.stream.nbytes for slot in run.collector.slots)
        return collect_original(run, peak_bytes)

    replacements: list[tuple[Any, str, Any]] = [
        (_host, "read", _fake_read),
        (_host, "upload", upload),
        (state, "random_basis", random_basis),
        (ranks_module, "allocate_ranks", _unequal_ranks),
        (calibrate_module, "preserved_random_state", null_context),
        (adapters_module, "preserved_random_state", null_context),
        (calibrate_module, "collect_result", collect_result),
        (prepare, "warn_of_counted_padding", lambda *args: None),
        (initialize_module, "check_not_trained", lambda model, adapter_name: None),
        (launch, "arch_of", lambda device: launch.ARCHS["sm_90"]),
        (nn.Module, "_apply", fake_cuda.apply_to_module),
        (torch.cuda, "reset_peak_memory_stats", lambda device: None),
        (torch.cuda, "memory_allocated", lambda device: memory.live),
        (torch.cuda, "max_memory_allocated", lambda device: memory.peak),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        owners = (
            calibrate_module.CalibrationPass,
            calibrate_module.InputStream,
            calibrate_module,
            calibrate_module,
            calibrate_module,
            initialize_module,
        )
        for owner, (phase, name) in zip(owners, PHASES.items(), strict=True):
            replacement = _in_phase(memory, phase, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage.*")
        yield


def _in_phase(memory: LiveMemory, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        number = f" {args[0].forwards + 1}" if name == "forward" else ""
        with memory.running(name + number):
            return function(*args, **kwargs)

    return run


def _fake_read(tensors: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
    """Answer as if data were of full rank, and still turning: no repair, no convergence."""
    if not tensors:
        return []
    torch.cat([t.reshape(-1).double() for t in tensors])  # what the host copies
    return [_plausible_values(tensor) for tensor in tensors]


def _plausible_values(tensor: Tensor) -> np.ndarray[Any, Any]:
    values = np.full(tensor.shape, 0.5)  # cosines, sums of squares, norms
    if tensor.dim() == 2 and tensor.shape[1] > 3:  # what a decomposition tells of each layer
        width = tensor.shape[1] // 2 - 1
        values[:, 0], values[:, 1] = width, 0  # full rank, even
        values[:, 2:] = np.tile(np.linspace(1.0, 0.1, width), 2)
    return values


def _unequal_ranks(ratios: Sequence[Tensor], budget: int, **ignored: Any) -> list[int]:
    """Give half of its neighbour's quarter to every other layer; the sum stays."""
    equal_rank, moved = budget // len(ratios), budget // len(ratios) // 4
    return [equal_rank + (moved if i % 2 else -moved) for i in range(len(ratios))]


HEADERS = [
    "model",
    "parameters",
    "plain forward",
    "with KV cache",
    "this package",
    "more than plain",
    "state and sums",
    "peak in",
]


def rows_for_table(record: Mapping[str, Any]) -> list[list[str]]:
    """Return a result file's rows as text below ``HEADERS``, GiB; peaks are above the parameters.

    Args:
        record: what ``simulated_memory.json`` holds.
    """
    return [
        [
            row["model"],
            f"{(row['base_bytes'] + row['adapter_bytes']) / GIB:.2f}",
            f"{row['plain']['bytes'] / GIB:.3f}",
            f"{row['cached']['bytes'] / GIB:.3f}",
            f"{row['ours']['bytes'] / GIB:.3f}",
            f"{(row['ours']['bytes'] - row['plain']['bytes']) / GIB:.3f}",
            f"{row['state_bytes'] / GIB:.3f}",
            row["ours"]["where"],
        ]
        for row in record["rows"]
    ]


def run(names: Sequence[str], write: bool) -> None:
    """Simulate models, print a table, and keep the result if asked."""
    rows = []
    title = f"GiB, simulated, batches of {BATCH} x {LENGTH} tokens; peaks above the parameters"
    table = Table(*HEADERS, title=title)
    for name in names:
        rows.append(asdict(simulate(name, MODELS[name]())))
        table.add_row(*rows_for_table({"rows": rows[-1:]})[0])
    Console(width=140).print(table)
    if write:
        save(
            "simulated_memory",
            rows,
            batch=BATCH,
            length=LENGTH,
            forwards=FORWARDS,
            r=RANK,
            rho=RHO,
            launch_numbers="sm_90",
        )

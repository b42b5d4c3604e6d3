"""Run the launchers as on a GPU, up to the launch; prints the names of the compiled kernels.

Run as a script, in a process that does not interpret kernels. A simulated driver reports a
chip and records launches; specialisation on arguments, compilation and options are Triton's own.
Fails unless later launches, by native code or by Triton's launcher alone, equal the first one.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit

from eva_kernels import _C, _native
from eva_kernels.kernels import sequence
from eva_kernels.kernels.gram import gram_sequence
from eva_kernels.kernels.launch import ARCHS
from eva_kernels.kernels.sketch import sketch_sequence

STREAM = 7
launched: list[tuple] = []
by_triton: list[str] = []  # kernels that Triton launched
kernels: dict[int, Any] = {}  # by handle


def launcher(source: Any, metadata: Any) -> Callable[..., None]:
    """Return a function that records a launch; it takes one argument for each in `source`."""

    def record(gx, gy, gz, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert min(gx, gy, gz) > 0, (gx, gy, gz)
        assert len(arguments) == len(source.signature), "a launcher takes what the signature names"
        passed = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        launched.append((gx, gy, gz, stream, function, *passed))

    return record


def driver_arguments(gx, gy, gz, stream, function, *arguments) -> tuple:
    """Return the arguments of the driver for those of Triton's launcher."""
    kernel = kernels[function]
    source, meta = kernel.src, kernel.metadata
    taken = [
        value
        for value, (name, kind) in zip(arguments, source.signature.items(), strict=True)
        if kind != "constexpr"
        and name not in source.constants  # Triton 3.2 gives constants a type, too
    ]
    # addresses of scratch memory, which Triton kernels take after their arguments
    scratch = [0] * (len(parameter_sizes(function)) - len(taken))
    how = 32 * meta.num_warps, meta.shared, launched_early(kernel)
    return (function, [gx, gy, gz], *how, [*taken, *scratch], stream)


def launched_early(kernel: Any) -> bool:
    return getattr(kernel.metadata, "launch_pdl", False)  # Triton 3.2 lacks it


class Launches(_C.LaunchList):
    """The native launch list with a driver that records launches."""

    def run(self, given, workspace, device, stream):
        launched.extend((*launch, stream) for launch in self.resolve(given, workspace))


def parameter_sizes(function: int) -> list[int]:
    """Return the parameter sizes that the driver would read from the compiled code."""
    declared = re.findall(r"\.param \.u(\d+) .*_param_\d+,?\n", kernels[function].asm["ptx"])
    return [int(bits) // 8 for bits in declared]


NATIVE = SimpleNamespace(LaunchList=Launches, parameter_sizes=parameter_sizes)


def simulated_driver(arch: str) -> SimpleNamespace:
    properties = {"max_shared_mem": ARCHS[arch].shared_bytes, "multiprocessor_count": 100}
    handles = iter(range(1, 1000))
    asks_threads = "n_max_threads" in inspect.getsource(CompiledKernel._init_handles)
    rest = (64, 0, 1024) if asks_threads else (64, 0)
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", int(arch[3:]), 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: STREAM,
        get_active_torch_device=lambda: torch.device("cpu"),
        map_python_to_cpp_type=lambda kind: kind,
        launcher_cls=launcher,
        utils=SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda *ignored: (1, next(handles), *rest),
            unload_module=lambda module: None,
        ),
    )


def check(launch: Callable[[], None], native: bool) -> None:
    """Launch once by Triton and twice by the relauncher; all launches must be equal."""
    _native.load_or_none = lambda kind: NATIVE if native else None
    launches_of_runs = []
    for i in range(3):
        launched.clear()
        count = len(by_triton)
        launch()
        assert (len(by_triton) > count) == (i == 0), "launched by the wrong launcher"
        launches_of_runs.append(list(launched))
    if native:
        launches_of_runs[0] = [driver_arguments(*launch) for launch in launches_of_runs[0]]
    assert launches_of_runs[0] == launches_of_runs[1] == launches_of_runs[2], launches_of_runs


def main(arch: str) -> None:
    driver.set_active(simulated_driver(arch))
    run = jit.JITFunction.run

    def named(self, *arguments, **options):
        by_triton.append(self.fn.__name__)
        compiled = run(self, *arguments, **options)
        kernels[compiled.function] = compiled
        # a kernel is launched early if and only if it waits for the preceding one itself
        assert launched_early(compiled) == ("griddepcontrol.wait" in compiled.asm["ptx"])
        assert launched_early(compiled) == ARCHS[arch].dependent_launch
        return compiled

    jit.JITFunction.run = named
    known, wide, n, q, d = ARCHS[arch], torch.float64, 333, 40, 512
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (None, torch.arange(300)):
            used = n if rows is None else len(rows)
            x = torch.zeros(n, d + 8, dtype=dtype)[:, :d]
            sums = torch.zeros(d, dtype=wide), torch.zeros((), dtype=wide)
            kind = x.stride(0), dtype, rows is not None, True, known
            state = torch.zeros(q, d), torch.zeros(d), torch.zeros(q, d), *sums
            sketched = sketch_sequence.__wrapped__(used, q, d, *kind)
            check_both(sketched, (x, rows, *state))
            for other, again in (
                (512, False),
                (used + 128, True),
            ):  # whole tiles, and the same specialisation
                more = sketch_sequence.__wrapped__(other, q, d, *kind)
                check_other(more, (x, rows, *state), again)
            state = torch.zeros(d), torch.zeros(d, d), *sums
            added = gram_sequence.__wrapped__(used, d, *kind)
            check_both(added, (x, rows, *state))
    sys.stdout.write(json.dumps(by_triton) + "\n")
    # Another alignment needs another kernel, which Triton has to choose.
    shifted = torch.zeros(n * (d + 8) + 1, dtype=dtype)[1:].view(n, d + 8)[:, :d]
    workspace = torch.empty(added.nbytes, dtype=torch.uint8)
    check(lambda: added.run((shifted, rows, *state), workspace), native=True)


def check_both(launches: sequence.LaunchSequence, tensors: tuple) -> None:
    """Check a sequence with native code and, after clearing the caches, without."""
    workspace = torch.empty(launches.nbytes + 3, dtype=torch.uint8)
    for native in (True, False):
        launches._relaunchers.clear()
        sequence._compiled.clear()
        check(lambda: launches.run(tensors, workspace), native)


def check_other(launches: sequence.LaunchSequence, tensors: tuple, again: bool) -> None:
    """Check a sequence with other numbers; Triton launches it first unless `again`."""
    workspace = torch.empty(launches.nbytes, dtype=torch.uint8)
    _native.load_or_none = lambda kind: NATIVE
    known, launches_of_runs = dict(sequence._compiled), []
    for uses_triton in (not again, True):
        launched.clear()
        count = len(by_triton)
        launches.run(tensors, workspace)
        assert (len(by_triton) > count) == uses_triton, "launched by the wrong launcher"
        launches_of_runs.append(
            [driver_arguments(*one) for one in launched] if uses_triton else list(launched)
        )
        launches._relaunchers.clear()
        sequence._compiled.clear()
    assert launches_of_runs[0] == launches_of_runs[1], launches_of_runs
    sequence._compiled.update(known)


if __name__ == "__main__":
    main(sys.argv[1])

"""Go through the launchers as on a GPU, up to the launch; writes what was compiled.

Run as a script, in a process that does not interpret kernels. A stand-in for the driver names a
chip and takes down what is launched; specialisation on arguments, compilation and options are
Triton's own. Fails unless later launches, by native code or past Triton's binding, are the same as
its first one.
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
    """Return what takes down a launch; as Triton's, it takes an argument for each in `source`."""

    def record(gx, gy, gz, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert min(gx, gy, gz) > 0, (gx, gy, gz)
        assert len(arguments) == len(source.signature), "a launcher takes what the signature names"
        passed = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        launched.append((gx, gy, gz, stream, function, *passed))

    return record


def at_driver(gx, gy, gz, stream, function, *arguments) -> tuple:
    """Return what the driver is given, of what Triton's launcher is given."""
    kernel = kernels[function]
    source, meta = kernel.src, kernel.metadata
    taken = [
        value
        for value, (name, kind) in zip(arguments, source.signature.items(), strict=True)
        if kind != "constexpr" and name not in source.constants  # 3.2 gives those a type, too
    ]
    # addresses of scratch memory, which a kernel of Triton takes behind its arguments
    scratch = [0] * (len(parameter_sizes(function)) - len(taken))
    how = 32 * meta.num_warps, meta.shared, launched_early(kernel)
    return (function, [gx, gy, gz], *how, [*taken, *scratch], stream)


def launched_early(kernel: Any) -> bool:
    return getattr(kernel.metadata, "launch_pdl", False)  # 3.2 does not know of it


class Launches(_C.LaunchList):
    """The native list, in front of a driver that takes down what it is given."""

    def run(self, given, workspace, device, stream):
        launched.extend((*launch, stream) for launch in self.resolve(given, workspace))


def parameter_sizes(function: int) -> list[int]:
    """Return what the driver would read in the compiled code."""
    declared = re.findall(r"\.param \.u(\d+) .*_param_\d+,?\n", kernels[function].asm["ptx"])
    return [int(bits) // 8 for bits in declared]


NATIVE = SimpleNamespace(LaunchList=Launches, parameter_sizes=parameter_sizes)


def stand_in(arch: str) -> SimpleNamespace:
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
    """Launch by Triton, then twice by what it returned: all launches must be the same."""
    _native.load_or_none = lambda kind: NATIVE if native else None
    seen = []
    for i in range(3):
        launched.clear()
        count = len(by_triton)
        launch()
        assert (len(by_triton) > count) == (i == 0), "who launched?"
        seen.append(list(launched))
    if native:
        seen[0] = [at_driver(*launch) for launch in seen[0]]
    assert seen[0] == seen[1] == seen[2], seen


def main(arch: str) -> None:
    driver.set_active(stand_in(arch))
    run = jit.JITFunction.run

    def named(self, *arguments, **options):
        by_triton.append(self.fn.__name__)
        compiled = run(self, *arguments, **options)
        kernels[compiled.function] = compiled
        # a kernel that waits by itself, and only such a one, is launched before its turn
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
            for other, again in ((512, False), (used + 128, True)):  # whole tiles, and as before
                more = sketch_sequence.__wrapped__(other, q, d, *kind)
                check_other(more, (x, rows, *state), again)
            state = torch.zeros(d), torch.zeros(d, d), *sums
            added = gram_sequence.__wrapped__(used, d, *kind)
            check_both(added, (x, rows, *state))
    sys.stdout.write(json.dumps(by_triton) + "\n")
    # Another alignment is another kernel, which Triton has to choose.
    shifted = torch.zeros(n * (d + 8) + 1, dtype=dtype)[1:].view(n, d + 8)[:, :d]
    workspace = torch.empty(added.nbytes, dtype=torch.uint8)
    check(lambda: added.run((shifted, rows, *state), workspace), native=True)


def check_both(launches: sequence.LaunchSequence, tensors: tuple) -> None:
    """Check a sequence with native code and, forgetting what is known by then, without."""
    workspace = torch.empty(launches.nbytes + 3, dtype=torch.uint8)
    for native in (True, False):
        launches._relaunchers.clear()
        sequence._compiled.clear()
        check(lambda: launches.run(tensors, workspace), native)


def check_other(launches: sequence.LaunchSequence, tensors: tuple, again: bool) -> None:
    """Check a sequence of other numbers: launches as Triton's, which is asked unless `again`."""
    workspace = torch.empty(launches.nbytes, dtype=torch.uint8)
    _native.load_or_none = lambda kind: NATIVE
    known, seen = dict(sequence._compiled), []
    for asks in (not again, True):
        launched.clear()
        count = len(by_triton)
        launches.run(tensors, workspace)
        assert (len(by_triton) > count) == asks, "who launched?"
        seen.append([at_driver(*one) for one in launched] if asks else list(launched))
        launches._relaunchers.clear()
        sequence._compiled.clear()
    assert seen[0] == seen[1], seen
    sequence._compiled.update(known)


if __name__ == "__main__":
    main(sys.argv[1])

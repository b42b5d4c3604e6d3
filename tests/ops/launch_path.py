"""Go through the launchers as on a GPU, up to the launch; writes what was compiled.

Run as a script, in a process that does not interpret kernels. A stand-in for the driver names a
chip and takes down what is launched; specialisation on arguments, compilation and options are
Triton's own. Fails unless later launches, which go past Triton, are the same as its first one.
"""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from eva_kernels.kernels import sequence
from eva_kernels.kernels.gram import launch_gram, plan_gram
from eva_kernels.kernels.launch import ARCHS
from eva_kernels.kernels.sketch import launch_sketch
from eva_kernels.kernels.sketch_plan import plan_sketch

STREAM = 7
launched: list[tuple] = []
by_triton: list[str] = []  # kernels that Triton launched


def record(gx, gy, gz, stream, function, metadata, launch_metadata, enter, leave, *arguments):
    assert min(gx, gy, gz) > 0, (gx, gy, gz)
    passed = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    launched.append((gx, gy, gz, stream, function, *passed))


def stand_in(arch: str) -> SimpleNamespace:
    properties = {"max_shared_mem": ARCHS[arch].shared_bytes, "multiprocessor_count": 100}
    handles = iter(range(1, 1000))
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", int(arch[3:]), 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: STREAM,
        get_active_torch_device=lambda: torch.device("cpu"),
        map_python_to_cpp_type=lambda kind: kind,
        launcher_cls=lambda source, metadata: record,
        utils=SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda *ignored: (1, next(handles), 64, 0, 1024),
            unload_module=lambda module: None,
        ),
    )


def check(launch: Callable[[], None]) -> None:
    """Launch by Triton, then twice by what it returned: all launches must be the same."""
    seen = []
    for i in range(3):
        launched.clear()
        count = len(by_triton)
        launch()
        assert (len(by_triton) > count) == (i == 0), "who launched?"
        seen.append(list(launched))
    assert seen[0] == seen[1] == seen[2], seen


def main(arch: str) -> None:
    driver.set_active(stand_in(arch))
    run = jit.JITFunction.run

    def named(self, *arguments, **options):
        by_triton.append(self.fn.__name__)
        compiled = run(self, *arguments, **options)
        # a kernel that waits by itself, and only such a one, is launched before its turn
        assert compiled.metadata.launch_pdl == ("griddepcontrol.wait" in compiled.asm["ptx"])
        assert compiled.metadata.launch_pdl == ARCHS[arch].dependent_launch
        return compiled

    jit.JITFunction.run = named
    sequence._can_be_kept = lambda device: True
    sequence._stream_of = lambda device: STREAM
    known, wide, n, q, d = ARCHS[arch], torch.float64, 333, 40, 512
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (None, torch.arange(300)):
            used = n if rows is None else len(rows)
            x = torch.zeros(n, d + 8, dtype=dtype)[:, :d]
            sums = torch.zeros(d, dtype=wide), torch.zeros((), dtype=wide)
            plan = plan_sketch(used, q, d, dtype != torch.bfloat16, known)
            workspace = torch.empty(plan.nbytes + 3, dtype=torch.uint8)
            state = torch.zeros(q, d), torch.zeros(d), torch.zeros(q, d), *sums
            given = (*state, rows, workspace, True, known)
            check(lambda x=x, given=given: launch_sketch(x, *given))
            plan = plan_gram(used, d, x.element_size(), known)
            workspace = torch.empty(plan.nbytes, dtype=torch.uint8)
            state = torch.zeros(d), torch.zeros(d, d), *sums
            given = (*state, rows, workspace, True, known)
            check(lambda x=x, given=given: launch_gram(x, *given))
    sys.stdout.write(json.dumps(by_triton) + "\n")
    # Another alignment is another kernel, which Triton has to choose.
    shifted = torch.zeros(n * (d + 8) + 1, dtype=dtype)[1:].view(n, d + 8)[:, :d]
    check(lambda: launch_gram(shifted, *given))


if __name__ == "__main__":
    main(sys.argv[1])

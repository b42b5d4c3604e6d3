"""Go through the launchers as on a GPU, up to the launch; writes what was compiled.

Run as a script, in a process that does not interpret kernels. A stand-in for the driver names a
chip; specialisation on arguments, compilation and options are Triton's own.
"""

import json
import sys
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from eva_kernels.kernels.gram import launch_gram, plan_gram
from eva_kernels.kernels.launch import ARCHS
from eva_kernels.kernels.sketch import launch_sketch, plan_sketch


def stand_in(arch: str) -> SimpleNamespace:
    properties = {"max_shared_mem": ARCHS[arch].shared_bytes, "multiprocessor_count": 100}
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", int(arch[3:]), 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
        map_python_to_cpp_type=lambda kind: kind,
        launcher_cls=lambda *arguments: None,
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )


def main(arch: str) -> None:
    driver.set_active(stand_in(arch))
    compiled = []
    run = jit.JITFunction.run

    def without_launch(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        assert all(size > 0 for size in grid), grid
        compiled.append([self.fn.__name__, kernel.metadata.num_warps, kernel.metadata.shared])
        return kernel

    jit.JITFunction.run = without_launch
    n, q, d, wide = 333, 40, 512, torch.float64
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (None, torch.arange(300)):
            used = n if rows is None else len(rows)
            x = torch.zeros(n, d, dtype=dtype)
            sums = torch.zeros(d, dtype=wide), torch.zeros((), dtype=wide)
            plan = plan_sketch(used, q, d, dtype != torch.bfloat16, ARCHS[arch])
            workspace = torch.empty(plan.nbytes, dtype=torch.uint8)
            state = torch.zeros(q, d), torch.zeros(d), torch.zeros(q, d), *sums
            launch_sketch(x, *state, rows, workspace, True, ARCHS[arch])
            plan = plan_gram(used, d, x.element_size(), ARCHS[arch])
            workspace = torch.empty(plan.nbytes, dtype=torch.uint8)
            state = torch.zeros(d), torch.zeros(d, d), *sums
            launch_gram(x, *state, rows, workspace, True, ARCHS[arch])
    sys.stdout.write(json.dumps(compiled) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

"""Build the native modules in place, for the GPU's architecture, and load them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ...files import ROOT
from ..context import Context, StageFailed

LOAD_SCRIPT = "import eva_kernels.{0} as module; print(module.__file__)"


def run(context: Context) -> None:
    """Build; a rehearsal builds only the CPU module, in its own folder, unless it is up to date."""
    if context.dry_run and (current := up_to_date(ROOT)):
        context.save({"modules": {"_C": _loaded_file("_C")}, "built_before": current})
        return
    environment = dict(os.environ)
    modules = ["_C"]
    if context.dry_run:
        environment["EVA_KERNELS_CUDA"] = "0"
        options = ["--build-lib", str(context.folder / "lib")]
    else:
        environment["EVA_KERNELS_CUDA"] = "1"
        environment.setdefault("EVA_KERNELS_CUDA_ARCHS", architecture())
        modules.append("_cuda")
        options = ["--inplace", "--force"]
    options += ["--build-temp", str(context.folder / "temp")]
    results = {"archs": environment.get("EVA_KERNELS_CUDA_ARCHS", ""), "nvcc": nvcc_version()}
    context.save(results)
    command = [sys.executable, "setup.py", "build_ext", *options]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise StageFailed("the build failed; see build/log.txt")
    if context.dry_run:
        built = sorted((context.folder / "lib").rglob("_C*.so"))
        if not built:
            raise StageFailed("the build produced no module")
        context.save({**results, "modules": {"_C": str(built[0].relative_to(context.out))}})
        return
    context.save({**results, "modules": {name: _loaded_file(name) for name in modules}})


def up_to_date(root: Path) -> str:
    """Return the name of the checkout's CPU module if it is newer than all of its sources."""
    sources = [root / "setup.py", *(root / "csrc").iterdir()]
    newest = max(path.stat().st_mtime for path in sources)
    built = [p for p in (root / "eva_kernels").glob("_C*.so") if p.stat().st_mtime >= newest]
    return built[0].name if built else ""


def _loaded_file(name: str) -> str:
    command = [sys.executable, "-c", LOAD_SCRIPT.format(name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise StageFailed(f"eva_kernels.{name} cannot be loaded: {done.stderr.strip()[-300:]}")
    return Path(done.stdout.strip()).name


def architecture() -> str:
    """Return the compute capability of the first device, as in "90"."""
    import torch

    if not torch.cuda.is_available():
        raise StageFailed("torch sees no CUDA device")
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}"


def nvcc_version() -> str:
    """Return the last line of ``nvcc --version``, or why nvcc could not run."""
    folders = (os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""))
    path = os.pathsep.join([*(f"{f}/bin" for f in folders if f), os.environ.get("PATH", "")])
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc", path=path) or "/usr/local/cuda/bin/nvcc"
    try:
        completed = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError as error:
        return f"none ({error.strerror})"
    return next(
        (line for line in completed.stdout.splitlines() if "release" in line), "unknown"
    ).strip()

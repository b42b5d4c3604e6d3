"""The CUDA module, where nvcc is installed: architectures, warnings, loading without a driver."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_setup() -> ModuleType:
    """Return setup.py as a module, without building anything."""
    spec = importlib.util.spec_from_file_location("eva_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc_that_compiles() -> Path | None:
    nvcc = load_setup().find_nvcc()
    if nvcc is None:
        return None
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    return nvcc if "compute_90" in listing.stdout else None


NVCC = nvcc_that_compiles()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc that knows compute_90"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build in place, in a copy of the sources, for every architecture."""
    folder = tmp_path_factory.mktemp("cuda")
    for name in ("csrc", "eva_kernels", "python"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "assets")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("EVA_")}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env={**kept, "EVA_KERNELS_CUDA": "1", "NVCC_APPEND_FLAGS": "-Werror all-warnings"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"\bwarning\b", (done.stdout + done.stderr).lower())
    return folder


def run_python(folder: Path, code: str) -> dict:
    # No torch: the module must load on its own, and a driver is hidden if there is one.
    code = f"import importlib.util, json\nfrom pathlib import Path\n{FIND}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FIND = """
[path] = Path("eva_kernels").glob("_cuda*.so")
spec = importlib.util.spec_from_file_location("_cuda", path)
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)
"""


def test_every_architecture_is_compiled_without_a_warning(built: Path) -> None:
    answer = run_python(built, 'print(json.dumps({"archs": cuda.archs, "toolkit": cuda.toolkit}))')
    listing = subprocess.run([str(NVCC), "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [arch for arch in load_setup().DEFAULT_ARCHS if f"compute_{arch}" in listing]
    assert answer["archs"].split() == known
    assert len(known) >= 5
    assert answer["toolkit"] >= 11000


def test_module_loads_without_a_driver_and_launches_raise(built: Path) -> None:
    code = """
answer = {"devices": cuda.device_count()}
fold = (0, 1, 1, 1, 0, 0, 0)
calls = {"convergence": (0, 1, 1, 0.5, 0, 0), "eigh": (0, 1, 1, 0, 0)}
calls |= {"fold_prepare": (*fold, 0, 0), "fold_measure": (*fold, 16, 0, 0, 0)}
calls |= {"fold_rows": (*fold, 0, 0, 0, 0), "nystrom": (0, 0, 0, 0, 1, 1, 0.0, 0, 0, 0, 0)}
calls["start"] = (0, 0, 0, 0, 0, 1, 1, 1.0, 16, 0)
for name, arguments in calls.items():
    try:
        getattr(cuda, name)(*arguments, 0, 0)
    except RuntimeError as error:
        answer[name] = str(error)
print(json.dumps(answer))
"""
    answer = run_python(built, code)
    assert answer["devices"] == 0
    passes = "fold_prepare", "fold_measure", "fold_rows"
    for name in ("convergence", "eigh", "nystrom", "start", *passes):
        assert re.match(r"eva_kernels: cuda\w+: .*\(cudaError\w+\)", answer[name]), answer

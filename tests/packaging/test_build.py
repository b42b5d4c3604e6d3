"""What the sdist and the wheel contain, and how the build behaves without a working nvcc."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import eva_kernels

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "build", "dist", "site", "demo-report", "*.egg-info", "__pycache__", "*.so"
)
BUILD = "from setuptools import build_meta; print(build_meta.build_{}('dist'))"


def run(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a folder, with only the given build variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("EVA_") and k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**kept, **variables},
        capture_output=True,
        text=True,
    )


def build(kind: str, folder: Path, **variables: str) -> Path:
    done = run(BUILD.format(kind), folder, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist" / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout") / "source"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    (copy / "eva_kernels" / "_C.stale.so").touch()
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    return build("sdist", checkout, EVA_KERNELS_CUDA="0")


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def broken_nvcc(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = tmp_path_factory.mktemp("broken") / "nvcc"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def wheel(unpacked: Path, broken_nvcc: str) -> Path:
    """Build the wheel from the sdist, over the leftovers of an earlier build.

    CUDA is requested where available, and here it is not.
    """
    library = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = unpacked / "build" / library / "eva_kernels"
    stale.mkdir(parents=True)
    for name in ("_cuda.stale.so", "_C.stale.so", "removed_module.py"):
        (stale / name).touch()
    (unpacked / "eva_kernels" / "_cuda.stale.so").touch()
    return build("wheel", unpacked, EVA_KERNELS_CUDA="auto", NVCC=broken_nvcc)


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def python_sources(checkout: Path) -> set[str]:
    folders = {"eva_kernels": checkout, "eva_peft": checkout / "python"}
    return {
        path.relative_to(parent).as_posix()
        for package, parent in folders.items()
        for path in (parent / package).rglob("*.py")
    }


def test_sdist_contains_what_a_build_needs(checkout: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {f"csrc/{path.name}" for path in (checkout / "csrc").iterdir()}
    tests = {path.relative_to(checkout).as_posix() for path in (checkout / "tests").rglob("*.py")}
    assert native | tests | {"setup.py", "pyproject.toml", "LICENSE", "Makefile"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_contains_both_packages_and_no_stale_files(checkout: Path, wheel: Path) -> None:
    names = files_of(wheel)
    python = {name for name in names if name.endswith(".py")}
    assert python == python_sources(checkout)
    compiled = sorted(name for name in names if name.endswith(".so"))
    assert len(compiled) == 1, "native code, and nothing for CUDA"
    assert compiled[0].startswith("eva_kernels/_C.cpython-")
    assert {"eva_kernels/py.typed", "eva_peft/py.typed"} <= names
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"eva_kernels", "eva_peft", f"eva_kernels-{eva_kernels.__version__}.dist-info"}


def test_wheel_contains_the_embedded_model(checkout: Path, wheel: Path) -> None:
    names = files_of(wheel)
    assets = checkout / "python" / "eva_peft" / "assets"
    data = {
        path.relative_to(checkout / "python").as_posix()
        for path in assets.rglob("*")
        if path.is_file()
    }
    assert data <= names
    assert [name for name in data if name.endswith(".safetensors")]
    assert wheel.stat().st_size < 12e6


def test_installed_module_computes(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import torch, eva_kernels._C\n"
        "from eva_kernels.ops import convergence\n"
        "x = torch.eye(3)\n"
        "print(eva_kernels._C.__file__)\n"
        "print(convergence([x], [-x], [2], 0.5, backend='native')[0].tolist())\n"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    path, values = done.stdout.splitlines()
    assert Path(path).resolve().is_relative_to(tmp_path.resolve())
    assert values == "[1.0, 1.0, 1.0]"


def test_required_cuda_fails_with_the_reason(unpacked: Path, broken_nvcc: str) -> None:
    done = run(BUILD.format("wheel"), unpacked, EVA_KERNELS_CUDA="1", NVCC=broken_nvcc)
    assert done.returncode != 0
    assert f"{broken_nvcc} knows none of the architectures 75" in done.stderr


def test_unknown_cuda_mode_fails(unpacked: Path) -> None:
    done = run(BUILD.format("wheel"), unpacked, EVA_KERNELS_CUDA="yes")
    assert "EVA_KERNELS_CUDA must be auto, 1 or 0, not 'yes'" in done.stderr


def test_pins_and_build_requirements_leave_torch_alone() -> None:
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert not [pin for pin in pins if pin.startswith(("torch=", "triton="))], (
        "make would replace it"
    )
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert '\nrequires = ["setuptools>=77", "pybind11>=2.12"]\n' in project
    assert f'\nversion = "{eva_kernels.__version__}"\n' in project


def test_native_code_is_plain_cxx17() -> None:
    compiler = shutil.which("clang++")  # stricter than g++, which the build uses here
    if compiler is None:
        pytest.skip("there is no clang++")
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    sources = [str(p) for p in (ROOT / "csrc").glob("*.cpp") if not p.name.startswith("bindings")]
    done = subprocess.run([compiler, *flags, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

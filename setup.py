"""Build the native modules; everything else about the package is in pyproject.toml.

`eva_kernels._C` (C++, CPU) is always built. `eva_kernels._cuda` is built when there is an nvcc.
Neither sees a torch header, so torch is not needed at build time.

EVA_KERNELS_CUDA        "auto" (default): build `_cuda` if nvcc is found and works, otherwise
                        continue without it; "1": fail if it cannot be built; "0": do not try.
EVA_KERNELS_CUDA_ARCHS  e.g. "80;90"; the last one is also embedded as PTX, for newer devices.
                        Default: those of DEFAULT_ARCHS that this nvcc supports.
CUDA_HOME, NVCC         location of nvcc, if it is neither on PATH nor in /usr/local/cuda.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

DEFAULT_ARCHS = ("75", "80", "86", "89", "90", "100", "120")
PACKAGES = ("eva_kernels", "eva_peft")
NATIVE = ("convergence", "eigh", "fold", "nystrom", "start")  # each has a .cpp (CPU) and a .cu
CUDA_SOURCES = [*(f"{name}.cu" for name in NATIVE), "launch.cu"]
CXX_FLAGS = [] if os.name == "nt" else ["-O3", "-Wall", "-Wextra"]
# --threads=0: the architectures are compiled at once, on as many cores as there are.
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "--threads=0"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]


def cuda_mode() -> str:
    """Return "auto", "1" or "0" from the environment."""
    mode = os.environ.get("EVA_KERNELS_CUDA", "auto").strip().lower() or "auto"
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"EVA_KERNELS_CUDA must be auto, 1 or 0, not {mode!r}")
    return mode


def find_nvcc() -> Path | None:
    """Return the CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("NVCC"),
        f"{home}/bin/nvcc" if home else None,
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((Path(c).resolve() for c in candidates if c and os.access(c, os.X_OK)), None)


def toolkit_root(nvcc: Path) -> Path:
    """Return the toolkit's folder as reported by nvcc, which may be a wrapper script elsewhere."""
    dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    log = subprocess.run(dry_run, capture_output=True, text=True).stderr
    top = next((line[7:] for line in log.splitlines() if line.startswith("#$ TOP=")), None)
    return Path(top).resolve() if top else nvcc.parent.parent


def cuda_archs(nvcc: Path) -> list[str]:
    """Return the compute capabilities to build for, such as "90"."""
    wanted = os.environ.get("EVA_KERNELS_CUDA_ARCHS", "").replace(",", ";").split(";")
    if archs := [arch.strip() for arch in wanted if arch.strip()]:
        return archs
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = listing.replace("compute_", "").split()
    return [arch for arch in DEFAULT_ARCHS if arch in known]


def static_runtime(root: Path) -> Path:
    """Return the folder of libcudart_static.a, so that users need no matching libcudart.so."""
    for folder in (root / "lib64", root / "targets" / "x86_64-linux" / "lib", root / "lib"):
        if (folder / "libcudart_static.a").exists():
            return folder
    raise CompileError(f"libcudart_static.a not found under {root}")


class BuildPy(build_py):
    """build_py that empties its folder first: build/ persists and would keep deleted modules."""

    def run(self) -> None:
        if not self.editable_mode:
            for package in PACKAGES:
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """build_ext that compiles .cu sources with nvcc, and removes modules of an earlier build."""

    def run(self) -> None:
        folder = Path("eva_kernels") if self.inplace else Path(self.build_lib, "eva_kernels")
        for stale in [*folder.glob("_C.*"), *folder.glob("_cuda.*")]:
            stale.unlink()
        super().run()

    def build_extension(self, ext: Pybind11Extension) -> None:
        cuda_sources = [source for source in ext.sources if source.endswith(".cu")]
        if cuda_sources:
            self.compile_cuda(ext, cuda_sources)
        super().build_extension(ext)

    def compile_cuda(self, ext: Pybind11Extension, sources: list[str]) -> None:
        """Compile `sources` to objects, and let `ext` link them and the static CUDA runtime."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("nvcc not found (set CUDA_HOME, or EVA_KERNELS_CUDA=0)")
        root, archs = toolkit_root(nvcc), cuda_archs(nvcc)
        if not archs:
            raise CompileError(f"{nvcc} knows none of the architectures {' '.join(DEFAULT_ARCHS)}")
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        ext.sources = [source for source in ext.sources if source not in sources]
        ext.include_dirs.append(str(root / "include"))
        ext.library_dirs.append(str(static_runtime(root)))
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        ext.define_macros.append(("EVA_CUDA_ARCHS", f'"{" ".join(archs)}"'))
        for source in sources:
            target = Path(self.build_temp, source).with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [str(nvcc), "-c", source, "-o", str(target), "-Icsrc", *NVCC_FLAGS, *gencode]
            self.announce(" ".join(command), level=2)
            if subprocess.run(command).returncode:
                raise CompileError(f"nvcc failed on {source}")
            ext.extra_objects.append(str(target))


def extension(name: str, sources: list[str]) -> Pybind11Extension:
    headers = sorted(str(path) for path in Path("csrc").glob("*.*h"))
    return Pybind11Extension(
        f"eva_kernels.{name}",
        [f"csrc/{source}" for source in sources],
        include_dirs=["csrc"],
        depends=headers,
        cxx_std=17,
        extra_compile_args=CXX_FLAGS,
    )


def extensions() -> list[Pybind11Extension]:
    found = []
    mode = cuda_mode()
    if mode == "1" or (mode == "auto" and find_nvcc() is not None):
        cuda = extension("_cuda", ["bindings_cuda.cpp", *CUDA_SOURCES])
        cuda.optional = mode == "auto"  # setuptools then turns a failure into a warning
        found.append(cuda)  # first, so that a required build that fails does so immediately
    return [*found, extension("_C", ["bindings.cpp", *(f"{name}.cpp" for name in NATIVE)])]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_py": BuildPy, "build_ext": BuildExt})

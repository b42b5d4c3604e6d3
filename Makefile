# Each target creates .venv if needed, and again when the package's build files change.
#
#   PYTHON       the interpreter of .venv                      make test PYTHON=python3.12
#   TORCH        the requirement to install as torch, instead of the tested release
#   TORCH_INDEX  where torch comes from, instead of pip's own index. PyPI's Linux wheel brings
#                gigabytes of CUDA; on a machine without an NVIDIA GPU take the CPU wheel:
#                make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   EVA_KERNELS_CUDA   auto, 1 or 0 (see setup.py); by default 0 on a machine without a GPU. If the
#                machine has no nvcc, it is installed from PyPI
#
# `make gpu-check` uses PYTHON directly, without a .venv, if it already has torch.
#
#   OUT          where its results go                          make gpu-check OUT=results
#   CHECK_ARGS   its further options                           CHECK_ARGS="--dry-run"
#
# `make bench` resumes where it was interrupted.
#
#   BENCH_OUT    where its results go                          make bench BENCH_OUT=bench/results
#   BENCH_ARGS   its further options                           BENCH_ARGS="--full"

PYTHON ?= python3
TORCH ?=
KNOWN_TORCH := 'torch==2.13.0; python_version < "3.15"' 'torch==2.15.0; python_version >= "3.15"'
TORCH_INDEX ?=
TRITON ?= triton==3.9.0; python_version >= "3.11" and platform_system == "Linux"
# PEFT imports these whenever they are installed, which takes seconds each time: so they are in a
# separate folder, which only the tests of quantised bases use.
QUANTIZATION := bitsandbytes==0.50.2 torchao==0.18.0 hqq==0.2.8.post1 einops==0.8.2 termcolor==3.3.0
OUT ?= gpu-check
BENCH_OUT ?= bench-report
BENCH_ARGS ?=
CHECK_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

HAS_NVCC := $(shell PATH="$$PATH:$$CUDA_HOME/bin:$$CUDA_PATH/bin:/usr/local/cuda/bin" command -v "$${NVCC:-nvcc}")
HAS_GPU := $(shell { nvidia-smi -L || test -e /dev/nvidia0; } >/dev/null 2>&1 && echo yes)
EVA_KERNELS_CUDA ?= $(if $(HAS_GPU),auto,0)
export EVA_KERNELS_CUDA
export OPENBLAS_NUM_THREADS ?= 1
FETCH_NVCC := $(if $(HAS_NVCC),,$(filter-out 0,$(EVA_KERNELS_CUDA)))
ifneq ($(FETCH_NVCC),)
export CUDA_HOME := $(CURDIR)/$(VENV)/nvcc/nvidia/cu13
endif

READY := $(VENV)/.ready
BUILD_FILES := pyproject.toml setup.py constraints.txt $(filter-out %.md,$(wildcard csrc/*))
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cuh csrc/*.cu tests/emulator/*.h tests/emulator/*.cpp)

.PHONY: help setup demo test lint bench gpu-check docs clean

help:
	@echo "make demo   EVA on the embedded model against PEFT's; writes demo-report/"
	@echo "make test   all tests      make lint   linters, formatters, types"
	@echo "make bench  every initialiser compared, in 25 minutes; writes bench-report/"
	@echo "make docs   API documentation in site/"
	@echo "make gpu-check  build, test, sanitise and measure on a GPU, in nine minutes; see bench/README.md"
	@echo "make clean  remove what was built; make setup creates .venv"

setup: $(READY)

# torch first and by itself, so that installing the package does not replace it. A CUDA torch
# brings its own triton; with a CPU torch, triton is added for its interpreter.
$(READY): $(BUILD_FILES)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(if $(TORCH),'$(TORCH)',$(KNOWN_TORCH))
	$(if $(HAS_GPU),,$(BIN)/python -m pip install '$(TRITON)')
	$(if $(FETCH_NVCC),$(BIN)/python -m pip install --upgrade --target $(VENV)/nvcc -r csrc/nvcc.txt || test "$(EVA_KERNELS_CUDA)" != 1)
	$(BIN)/python -m pip install -c constraints.txt -e ".[all]"
	$(BIN)/python -m pip install --no-deps --upgrade --target $(VENV)/quantization $(QUANTIZATION)
	touch $@

demo: $(READY)
	$(BIN)/eva-kernels demo --out demo-report

# EVA_TESTS_HAVE_ALL_EXTRAS: all packages are installed, so no test may be skipped for lack of one.
# --dist loadfile: the fixtures of a file are set up in one process only.
# One process per core, one thread each: more threads would only compete for the cores.
test: $(READY)
	OMP_NUM_THREADS=1 EVA_TESTS_HAVE_ALL_EXTRAS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

bench: $(READY)
	$(BIN)/python -m bench --out "$(BENCH_OUT)" $(BENCH_ARGS)

gpu-check:
	@if $(PYTHON) -c 'import torch, typer' 2>/dev/null; then \
	  exec $(PYTHON) -m bench gpu-check --out "$(OUT)" $(CHECK_ARGS); \
	else \
	  $(MAKE) setup && exec $(BIN)/python -m bench gpu-check --out "$(OUT)" $(CHECK_ARGS); \
	fi

docs: $(READY)
	$(BIN)/pdoc --docformat google -o site eva_kernels eva_kernels.ops eva_kernels.streaming eva_kernels.reference eva_kernels.errors eva_peft

clean:
	rm -rf build dist site demo-report bench-report gpu-check *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(READY) eva_kernels/_C*.so eva_kernels/_cuda*.so

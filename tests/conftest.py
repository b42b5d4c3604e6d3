"""Set up the process for tests: no network, few threads, the Triton interpreter without a GPU."""

import os
import sys
from collections.abc import Iterator

# Read when numpy and triton are first imported, so these precede all other imports.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Workers of pytest-xdist share the cores, and inherit the environment of their controller.
os.environ |= {"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {}
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA and "TRITON_INTERPRET" not in os.environ:
    # Triton fixes the mode on import: setting the variable later would mix both modes.
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/conftest.py could set its mode")
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # By default pytest-xdist starts with files of many tests, and so ends with the slowest ones.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    # Slow files come first, so that no process is idle at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    skip = pytest.mark.skip(reason="needs a CUDA device, torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def single_thread() -> Iterator[None]:
    """Use one thread: tiny tensors gain nothing from more, and lose much on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Device of the numeric tests: the GPU if there is one."""
    return torch.device("cuda", 0) if HAS_CUDA else torch.device("cpu")

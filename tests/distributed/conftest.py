"""Run all scenarios once in two processes, for all files that test their results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
Results = tuple[dict[str, Any], dict[str, Any]]  # of either process, by scenario


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return the results of each process; the first worker of pytest-xdist runs them for all."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    paths = [folder / f"{rank}.pt" for rank in (0, 1)]
    with FileLock(folder / "scenarios.lock"):
        if not all(path.exists() for path in paths):
            run_scenarios(folder)
    one, other = (torch.load(path, weights_only=False) for path in paths)
    return one, other


def run_scenarios(folder: Path) -> None:
    paths = [ROOT / "tests", ROOT, ROOT / "python", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1"}
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher += ["--log-dir", str(folder / "log")]
    command = [sys.executable, "-m", *launcher, str(Path(__file__).with_name("worker.py"))]
    with subprocess.Popen(
        [*command, str(folder)], stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        try:
            _, errors = running.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            running.terminate()  # unlike kill, this also ends the two processes
            raise
    assert running.returncode == 0, errors[-3000:]

"""Separate processes for measurements, which are ended together with all their children."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from .files import ROOT

GRACE_SECONDS = 3.0  # from the request to terminate to the kill
STOP_SECONDS = 0.2  # until a request to stop is noticed
# Freed blocks are returned to the system at once, so that the high-water mark is of live memory.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class ChildFailedError(RuntimeError):
    """The process gave no answer; the message says why, in a line."""


def ask_child(module: str, question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Run ``python -m MODULE`` with a question as JSON, and return its answer.

    The process reads the question as its only argument and prints the answer, JSON on one line,
    as the last of its output.

    Args:
        module: with a ``__main__``.
        question: what JSON can hold.
        seconds: after which it is ended.

    Raises:
        ChildFailedError: it failed, or took too long.
    """
    command = [sys.executable, "-m", module, json.dumps(question)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with log.open("w", encoding="utf-8") as file:
            environment = {**child_environment(os.environ), **ALLOCATOR}
            status = run_limited(command, seconds, file, environment)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if status is None:
        raise ChildFailedError(f"no answer within {seconds:.0f} s")
    if status != 0:
        printed_lines = [line for line in lines if line.strip()]
        raise ChildFailedError(
            printed_lines[-1][:300] if printed_lines else f"ended with status {status}"
        )
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def child_environment(base_environment: Mapping[str, str], dry_run: bool = False) -> dict[str, str]:
    """Return the environment of a process: the checkout's code first, no network, the right Triton.

    Args:
        base_environment: to begin with.
        dry_run: use no GPU, and Triton's interpreter.
    """
    environment = {
        key: value for key, value in base_environment.items() if key != "TRITON_INTERPRET"
    }
    paths = [str(ROOT), str(ROOT / "python"), base_environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def run_limited(
    command: Sequence[str],
    seconds: float,
    log: Any,
    environment: Mapping[str, str],
    stop: threading.Event | None = None,
) -> int | None:
    """Run a process with everything it starts; return its exit status, ``None`` if it was killed.

    It has a process group of its own, so that nothing it started outlives it.

    Args:
        command, environment: of the process.
        seconds: after which it is killed.
        log: a file for what it says.
        stop: it is killed, too, once this is set.
    """
    # A signal that ends the caller must not come between the start of a process and the block that
    # ends it.
    blocked_signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    process = None
    try:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, blocked_signals),
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_signals)
        return _wait(process, seconds, stop)
    finally:
        if process is not None:
            _terminate_group(process)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_signals)


def _wait(
    process: subprocess.Popen[bytes], seconds: float, stop: threading.Event | None
) -> int | None:
    end = time.monotonic() + seconds
    while (remaining := end - time.monotonic()) > 0 and not (stop is not None and stop.is_set()):
        try:
            return process.wait(timeout=remaining if stop is None else min(remaining, STOP_SECONDS))
        except subprocess.TimeoutExpired:
            continue
    return None


def _terminate_group(process: subprocess.Popen[bytes]) -> None:
    for number, timeout in ((signal.SIGTERM, GRACE_SECONDS - 1.0), (signal.SIGKILL, 1.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            continue


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Handle a signal by an exception, so that what was started is ended."""
    sys.exit(128 + number)

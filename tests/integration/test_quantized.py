"""Quantised bases on the CPU; see ``quantized_child.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# `make setup` puts these libraries there, out of the way of all other tests
LIBRARIES = Path(sys.prefix) / "quantization"
KINDS = {
    "bnb-nf4": ("bitsandbytes", "Linear4bit"),
    "bnb-fp4": ("bitsandbytes", "Linear4bit"),
    "bnb-8": ("bitsandbytes", "Linear8bitLt"),
    "torchao-int8": ("torchao", "Linear"),
    "hqq": ("hqq", "HQQLinear"),
}


def run_child(kind: str, way: str) -> dict[str, Any]:
    library = KINDS[kind][0]
    if not (LIBRARIES / library).is_dir() and find_spec(library) is None:
        pytest.skip(f"{library} is not installed; `make setup` does")
    environment = dict(os.environ)
    parts = [ROOT / "tests", ROOT, ROOT / "python", LIBRARIES, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, parts))
    script = str(Path(__file__).with_name("quantized_child.py"))
    done = subprocess.run(
        [sys.executable, script, kind, way],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    return told


@pytest.mark.slow
@pytest.mark.parametrize("way", ["base", "meta"])
@pytest.mark.parametrize("kind", KINDS)
def test_initialise_train_save_load(kind: str, way: str) -> None:
    if way == "meta" and kind in ("bnb-fp4", "hqq"):
        pytest.skip("one way in is enough for a variant; the other is tested with its kin")
    told = run_child(kind, way)
    assert told["layer"] == KINDS[kind][1]
    if kind == "torchao-int8":
        assert told["weight"] != "Parameter"
    assert told["layers"] == 8
    assert told["orthonormal"] < 1e-5
    assert told["dtypes"] == ["torch.float32"]
    assert told["changed"] == []
    assert told["gradients"]
    assert told["tokens"] > 0
    assert told["moved"] > 0
    assert told["reload"] == 0

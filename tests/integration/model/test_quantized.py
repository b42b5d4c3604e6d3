"""Quantised base models on the CPU, run by ``quantized_child.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
# `make setup` installs these libraries there, apart from all other tests
LIBRARIES = Path(sys.prefix) / "quantization"
KINDS = {
    "bnb-nf4": ("bitsandbytes", "Linear4bit"),
    "bnb-fp4": ("bitsandbytes", "Linear4bit"),
    "bnb-8": ("bitsandbytes", "Linear8bitLt"),
    "torchao-int8": ("torchao", "Linear"),
    "hqq": ("hqq", "HQQLinear"),
}


CASES = [
    (kind, way)
    for kind in KINDS
    for way in ("base", "meta")  # one way is enough for variants of a kind tested above
    if way == "base" or kind not in ("bnb-fp4", "hqq")
]


def is_installed(kind: str) -> bool:
    library = KINDS[kind][0]
    return (LIBRARIES / library).is_dir() or find_spec(library) is not None


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Return the answers by case, from one process, since its imports take longest."""
    environment = dict(os.environ)
    parts = [ROOT / "tests", ROOT, ROOT / "python", LIBRARIES, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, parts))
    cases = [f"{kind}/{way}" for kind, way in CASES if is_installed(kind)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("quantized_child.py")), *cases],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "way"), CASES)
def test_quantised_base_initialises_trains_saves_and_loads(
    kind: str, way: str, answers: dict[str, Any]
) -> None:
    if not is_installed(kind):
        pytest.skip(f"{KINDS[kind][0]} is not installed; `make setup` does")
    answer = answers[f"{kind}/{way}"]
    assert "error" not in answer, answer["error"]
    assert answer["layer"] == KINDS[kind][1]
    if kind == "torchao-int8":
        assert answer["weight"] != "Parameter"
    assert answer["layers"] == 8
    assert answer["orthonormal"] < 1e-5
    assert answer["dtypes"] == ["torch.float32"]
    assert answer["changed"] == []
    assert answer["gradients"]
    assert answer["tokens"] > 0
    assert answer["moved"] > 0
    assert answer["reload"] == 0

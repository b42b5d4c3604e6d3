"""The optional stages of the GPU check: their summaries, outcomes and text."""

import sys
from pathlib import Path
from typing import Any

import pytest

from bench.cost import depth
from bench.gpu_check import child, context, table
from bench.gpu_check.stages import corda, quality, tune

BASE = {"domain": quality.DOMAIN, "base": True, "parameters": 88_000_000, "loss": 3.0, "score": 0.4}


def record(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Return the record of a ``quality`` run whose methods have these final losses."""

    def row(method: str, seed: int, loss: float, on: str) -> dict[str, Any]:
        where = {"domain": quality.DOMAIN, "method": method, "rate": 1e-3, "seed": seed, "on": on}
        return {**where, "loss": loss, "score": 1 / loss}

    sweep = [row(name, 100, values[0], "validation") for name, values in losses.items()]
    final = [
        row(name, seed, loss, "test")
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return {
        "settings": {
            "methods": {name: name.upper() for name in losses},
            "domains": {quality.DOMAIN: {"rates": [1e-3, 1e-2]}},
        },
        "rows": {"bases": [BASE], "sweep": sweep, "final": final},
    }


def test_quality_summary_and_text() -> None:
    found = quality.summary(record({"lora": [2.0, 2.2], "eva": [1.8, 2.0]}))
    assert found["base"]["loss"] == 3.0
    lora, eva = found["rows"]
    assert (lora["method"], lora["seeds"], lora["rate"]) == ("lora", 2, 1e-3)
    assert lora["loss"] == pytest.approx(2.1)
    assert eva["score"] == pytest.approx((1 / 1.8 + 1 / 2.0) / 2)
    assert quality.failure_reason(found["rows"]) == ""
    text = table.render({**EMPTY, "stages": {"quality": passed(found)}})
    assert "quality, 88 million parameters" in text
    assert "2.1000" in text


def test_quality_names_methods_that_failed() -> None:
    given = record({"lora": [2.0, 2.2], "eva": [1.8]})
    given["rows"]["final"] = [r for r in given["rows"]["final"] if r["method"] == "lora"]
    for row in given["rows"]["sweep"]:
        if row["method"] == "eva":
            row["error"] = "OutOfMemoryError: x"
    found = quality.summary(given)
    assert quality.failure_reason(found["rows"]) == "eva: OutOfMemoryError: x"
    assert quality.failure_reason([]) != ""
    table.render({**EMPTY, "stages": {"quality": passed(found)}})


EMPTY: dict[str, Any] = {
    "status": "passed",
    "dry_run": False,
    "date": "",
    "commit": "",
    "sources": "",
    "machine": {},
    "versions": {},
}


def passed(results: dict[str, Any]) -> dict[str, Any]:
    return {"status": "passed", "seconds": 1.0, "reason": "", "results": results}


def test_outcome_and_text_of_tuning() -> None:
    shape = {"N": 64, "D": 96, "Q": 16}
    timed = {"shape": shape, "change": "as is", "status": "timed", "over_as_is": 1.0}
    timed["ms"] = {"median": 0.042}
    too_large = {"shape": shape, "change": "x", "status": "failed", "reason": "OutOfResources"}
    wrong = {"shape": shape, "change": "y", "status": "incorrect", "reason": "relative error 1e-2"}
    assert tune.failure_reason([timed, too_large]) == ""
    assert tune.failure_reason([timed, wrong]) == "y: relative error 1e-2"
    assert tune.failure_reason([too_large]) != ""
    text = table.render({**EMPTY, "stages": {"tune": passed({"rows": [timed, too_large]})}})
    assert "N=64 D=96 Q=16: as is" in text
    assert "42.0" in text


def test_outcome_and_text_of_corda() -> None:
    row = {"method": "corda-ipm", "depth": 32, "from": [1, 2], "init_s": 300.0, "init_peak": 2**32}
    assert corda.failure_reason([row]) == ""
    failed = {"method": "corda-ipm", "error": "OutOfMemoryError"}
    assert corda.failure_reason([failed]) == "corda-ipm: OutOfMemoryError"
    assert corda.failure_reason([]) != ""
    text = table.render({**EMPTY, "stages": {"corda": passed({"whole": [row, failed]})}})
    assert "32 layers (extrapolated from 1 and 2): 300 s, 4 GiB above the weights" in text


def test_corda_keeps_rows_measured_before_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"init_s": {"median": 12.3}, "init_peak": {"median": 2**31}}
    row = {"method": "corda-ipm", "depth": 1, "repeats": 1, **figures}

    def run(*_: Any, repeats: int, on_rows: Any, **more: Any) -> Path:
        assert repeats == 1
        on_rows([row])
        raise KeyboardInterrupt

    monkeypatch.setattr(depth, "run", run)
    monkeypatch.setattr(corda, "missing_package", str)
    given = context.Context("corda", tmp_path, dry_run=True, seconds=30.0)
    with pytest.raises(KeyboardInterrupt):
        corda.run(given)
    found = {**passed(given.saved()), "status": "timed out"}
    text = table.render({**EMPTY, "stages": {"corda": found}})
    assert "corda-ipm, 1 layer (measured once): 12.3 s, 2 GiB above the weights" in text


@pytest.mark.parametrize("module", ["attr", "peft.tuners.lora.corda"])
def test_corda_is_skipped_if_a_package_is_missing(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "peft.tuners.lora.corda", raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    given = context.Context("corda", tmp_path, dry_run=True, seconds=30.0)
    assert child.run_stage(given) == child.SKIPPED
    name = "attrs" if module == "attr" else module
    reason = f"PEFT's CorDA needs the package {name}, which is not installed"
    assert reason in context.result_path(tmp_path, "corda").read_text()

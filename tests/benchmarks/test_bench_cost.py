"""The benchmark part ``cost``: measurements of each initialiser, tables and text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaConfig

from bench.cost import __main__ as measuring
from bench.cost import depth
from bench.cost import run as running
from bench.cost.configs import CONFIGS
from bench.cost.show import HEADERS, comparison_text, sections, short_section
from bench.methods import METHODS
from extras import needs_of


def model() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a tiny model, and measure in this process."""
    made = dataclasses.replace(
        CONFIGS["tiny"], make_config=model, samples=16, length=16, r=4, seconds=0.0
    )
    monkeypatch.setitem(CONFIGS, "tiny", made)
    monkeypatch.setattr(
        running, "ask_child", lambda module, question, seconds: measuring.measure_method(question)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measure(out: Path, methods: list[str]) -> dict[str, Any]:
    path = running.run("tiny", out, methods, quiet=True)
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.mark.slow
def test_rows_hold_time_and_memory(tmp_path: Path) -> None:
    record = measure(tmp_path, ["lora", "pissa", "lora-ga", "eva-peft", "eva"])
    rows = record["rows"]
    assert not [row for row in rows if "error" in row]
    sizes: dict[str, list[int]] = {}
    for row in rows:
        sizes.setdefault(row["method"], []).append(row["batch"])
    assert sizes["lora"] == sizes["pissa"] == [16]
    assert sizes["eva"] == sizes["lora-ga"] == [16, 8, 4]
    by_name = {(row["method"], row["batch"]): row for row in rows}
    assert by_name["lora-ga", 4]["tokens"] == 256
    assert by_name["eva", 16]["forwards"] <= 2
    assert by_name["eva", 4]["forwards"] <= 8
    for row in rows:
        changed = row["method"] in ("pissa", "lora-ga")
        assert (row["weights_changed"] > 0) == changed
        assert row["ranks"] == 28
        assert row["init_s"]["median"] > 0
        assert row["repeats"] == 2
    assert by_name["eva", 8]["reload_difference"] == by_name["lora", 16]["reload_difference"] == 0
    assert by_name["lora-ga", 8]["reload_difference"] > 0


def test_method_limited_to_one_sample_has_one_row(tmp_path: Path) -> None:
    needs_of("corda-ipm")
    [row] = measure(tmp_path, ["corda-ipm"])["rows"]
    assert (row["batch"], row["tokens"], row["ranks"]) == (1, 256, 28)
    assert row["weights_changed"] > 0
    assert "eigens" in row["reload_error"]


def test_failed_reload_without_a_message_is_kept() -> None:
    adapted = Mock()
    adapted.save_pretrained.side_effect = ValueError
    found = measuring._reload_difference(adapted, Mock(), torch.zeros(1, 2))
    assert found == {"reload_error": "ValueError: ValueError"}


def test_failing_method_keeps_a_row_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise NotImplementedError("not on this | machine")

    broken_method = dataclasses.replace(METHODS["dora"], start=broken)
    monkeypatch.setitem(METHODS, "dora", broken_method)
    record = measure(tmp_path, ["lora", "dora"])
    assert record["rows"][1]["error"] == "NotImplementedError: not on this | machine"
    for gpu, columns in ((None, [h for h in HEADERS if h != "reserved"]), ("a GPU", HEADERS)):
        record["machine"]["gpu"] = gpu  # the allocator's share is only reported for GPUs
        section = sections(record)[0]
        assert section.rows[1][2] == "NotImplementedError: not on this \\| machine"
        assert section.headers == columns
        assert {len(row) for row in section.rows} == {len(columns)}
    assert short_section(record).rows[1][:3] == ["DoRA", "-", section.rows[1][2]]


def test_missing_gpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    # on a machine with a GPU it would measure a model of seven billion weights instead
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a GPU"):
        running.run("llama-2-7b")


def row(method: str, batch: int, seconds: float, peak: float) -> dict[str, Any]:
    one = {"median": seconds, "p20": seconds, "p80": seconds}
    memory = {"median": peak * 2**20, "p20": 0.0, "p80": 0.0}
    return {
        "method": method,
        "batch": batch,
        "init_s": one,
        "init_peak": memory,
        "init_reserved": memory,
        "first_step_peak": memory,
        "train_step_s": 0.5,
        "seconds": {"apply": one},
        "forwards": 1,
        "tokens": 2,
        "weights_changed": 0.0,
        "reload_difference": 0.25,
    }


def test_text_and_table_cells() -> None:
    rows = [
        row("lora", 16, 0.1, 1),
        row("corda-ipm", 1, 1.0, 400),
        row("eva-peft", 8, 8.0, 100),
        row("eva", 8, 2.0, 50),
    ]
    text = comparison_text(rows)
    assert "CorDA (ipm) takes 0.50 times as long" in text
    assert "(batch 8; below 1 it is faster), and this package 0.12 of its memory" in text
    assert "EVA (PEFT) takes 4.00 times as long" in text
    assert "LoRA-GA (paper): no numbers" in text
    settings = {
        "config": "tiny",
        "weights": "random",
        "samples": 4,
        "length": 8,
        "passes": 2,
        "epoch": 80,
        "train_batch": 8,
        "r": 4,
        "dtype": "float32",
        "model": {"num_hidden_layers": 1, "hidden_size": 2, "vocab_size": 3},
    }
    record = {"settings": settings, "rows": rows, "machine": {"gpu": "a GPU"}}
    section = sections(record)[0]
    eva = dict(zip(HEADERS, section.rows[3], strict=True))
    assert eva["reserved"] == "50 MiB"
    assert (eva["apply"], eva["collect"]) == ("2.00 s", "")
    assert eva["of an epoch"] == "40 %"  # 2 s of 10 steps of half a second
    assert eva["memory"] == "50 MiB"
    assert eva["reload"] == "off by 2.5e-01"
    assert [cells[0] for cells in short_section(record).rows] == [
        cells[0] for cells in section.rows
    ]
    assert next(iter(section.figures.values()))() is not None


@pytest.mark.slow
def test_depths_are_measured_and_extrapolated(tmp_path: Path) -> None:
    methods = ["eva", "corda-ipm"]
    path = depth.run("tiny", (3, 2), methods, batch=8, out=tmp_path, quiet=True)
    record = json.loads(path.read_text())
    measured, whole = record["rows"]["measured"], record["rows"]["whole"]
    assert [(row["method"], row["batch"], row["depth"]) for row in measured] == [
        ("eva", 8, 2), ("eva", 8, 3), ("corda-ipm", 1, 2), ("corda-ipm", 1, 3),
    ]  # fmt: skip
    assert [row["depth"] for row in whole] == [1, 1]
    assert whole[0]["from"] == [2, 3]
    assert "**extrapolated**" in depth.sections(record)[0].text
    assert "Every depth was" not in depth.sections(record)[0].text
    with pytest.raises(ValueError, match="two different depths"):
        depth.run("tiny", (2, 2), ["eva"], out=tmp_path, quiet=True)


@pytest.mark.slow
def test_rows_are_passed_on_after_each_depth(tmp_path: Path) -> None:
    kept: list[list[int]] = []

    def on_rows(rows: list[dict[str, Any]]) -> None:
        kept.append([row["depth"] for row in rows])
        if len(kept) == 1:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"out": tmp_path, "quiet": True, "repeats": 1, "on_rows": on_rows}
    with pytest.raises(KeyboardInterrupt):
        depth.run("tiny", (1, 2), ["lora"], **options)
    record = json.loads(depth.run("tiny", (1, 2), ["lora"], **options).read_text())
    assert kept == [[1], [1], [1, 2]]
    assert [row["repeats"] for row in record["rows"]["measured"]] == [1, 1]
    assert "Every depth was measured 1x." in depth.sections(record)[0].text


def test_extrapolation_through_two_depths() -> None:
    def row(layers: int, seconds: float) -> dict[str, Any]:
        figures = {name: {"median": seconds} for name in depth.QUANTITIES}
        return {"method": "eva", "batch": 4, "depth": layers, "forwards": 8, **figures}

    [found] = depth.extrapolate([row(6, 7.0), row(2, 3.0), row(4, 4.0)], full_depth=32)
    assert found["init_s"] == 33.0
    assert found["init_s_off"] == [0.25]  # 5 by extrapolation, 4 in truth
    assert found["from"] == [2, 4, 6]
    cells = depth._table_row(found)
    assert cells[-3:] == ["2, 4, 6", "8, 8, 8", "+25%"]
    assert len(cells) == len(depth.HEADERS)
    assert found["init_peak_of_a_layer"] == 1.0
    [failed] = depth.extrapolate(
        [row(2, 3.0), {**row(6, 1.0), "error": "no memory"}], full_depth=32
    )
    assert failed["error"] == "no memory"
    assert "init_s" not in failed
    assert "no memory" in depth._table_row(failed)
    assert len(depth._table_row(failed)) == len(depth.HEADERS)


def test_depth_sets_the_number_of_layers() -> None:
    question = {"config": "tiny", "method": "lora", "batch": 16, "real": False, "depth": 2}
    assert measuring.measure_method(question)["layers"] == 2 * 7  # targets of a layer
    for name, config in CONFIGS.items():
        assert config.with_depth(2).make_config().num_hidden_layers == 2, name
    assert len(CONFIGS["gemma-2-9b"].with_depth(3).make_config().layer_types) == 3

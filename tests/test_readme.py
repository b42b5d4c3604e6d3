"""The README shows what was measured, and nothing else."""

import json

import pytest

from bench import tables


def test_tables_are_those_of_the_result_files():
    text = tables.README.read_text()
    assert text == tables.with_tables(text)


def test_a_block_that_is_missing_is_named():
    with pytest.raises(ValueError, match="no block 'headline' between"):
        tables.with_tables("# eva_kernels")


def test_the_headline_says_what_the_result_files_say(tmp_path):
    records = {
        "initialize": [{"peft_over_ours": {"median": m}} for m in (3.26, 5.04, 4.1)],
        "memory": {"ours_over_plain": 2**20, "peft_over_plain": 7 * 2**20},
        "ranks": {"ours_lost_mean": 2e-4, "peft_lost_mean": 3e-3},
        "families": [
            {"ours": {"error": ours}, "peft": {"error": peft}}
            for ours, peft in [(None, None), (None, "KeyError"), ("ValueError", "KeyError")]
        ],
    }
    for name, rows in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    time, memory, accuracy, models = tables.headline(tmp_path).splitlines()
    assert "3.3 to 5.0 times" in time
    assert "1 MiB (PEFT's 7)" in memory
    assert accuracy.index("2.0e-04") < accuracy.index("PEFT's 3.0e-03")
    assert models.endswith("2 of 3 families work by default options (PEFT's 1).")

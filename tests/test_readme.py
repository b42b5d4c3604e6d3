"""The tables and headline of the README against the result files."""

import json

import pytest

from bench import tables


def test_readme_tables_match_the_result_files():
    text = tables.README.read_text()
    assert text == tables.with_tables(text)


def test_error_names_a_missing_block():
    with pytest.raises(ValueError, match="no block 'headline' between"):
        tables.with_tables("# eva_kernels")


def test_headline_follows_the_result_files(tmp_path):
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

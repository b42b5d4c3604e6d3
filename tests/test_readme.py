"""The README shows what was measured, and nothing else."""

import pytest

from bench import tables


def test_tables_are_those_of_the_result_files():
    text = tables.README.read_text()
    assert text == tables.with_tables(text)


def test_a_block_that_is_missing_is_named():
    with pytest.raises(ValueError, match="no block 'bench' between"):
        tables.with_tables("# eva_kernels")

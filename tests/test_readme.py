"""The README shows what was measured, and nothing else."""

from bench import tables


def test_tables_are_those_of_the_result_files():
    text = tables.README.read_text()
    shown = text.partition(tables.BEGIN)[2].partition(tables.END)[0]
    assert shown.strip() == tables.render()

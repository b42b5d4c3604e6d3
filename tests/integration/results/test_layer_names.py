"""Module kinds and block indices of layers, as plots and summaries show them."""

from __future__ import annotations

import pytest

from eva_peft.results.layer_names import layer_table, module_kinds


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.12.self_attn.q_proj"], [("q_proj", 12)]),
        (["0", "2"], [("0", None), ("2", None)]),
        (["net.0.fc", "net.1.fc"], [("fc", 0), ("fc", 1)]),
        (
            ["e.0.attention.output.dense", "e.0.output.dense", "e.0.intermediate.dense"],
            [("attention.output.dense", 0), ("output.dense", 0), ("intermediate.dense", 0)],
        ),
        (
            ["encoder.block.0.q", "decoder.block.0.q", "decoder.block.0.cross", "q"],
            [("encoder: q", 0), ("decoder: q", 0), ("cross", 0), ("no block: q", None)],
        ),
        (
            ["m.vision.layers.0.q", "m.text.layers.0.q"],
            [("vision: q", 0), ("text: q", 0)],
        ),
        (
            ["b.0.to_q", "b.0.to_out.0", "b.0.0", "b.0.experts.0.up", "b.0.experts.1.up"],
            [("to_q", 0), ("to_out.0", 0), ("0", 0), ("experts.0.up", 0), ("experts.1.up", 0)],
        ),
    ],
)
def test_names_are_split_into_kind_and_block(
    names: list[str], expected: list[tuple[str, int | None]]
) -> None:
    assert list(layer_table(names).values()) == expected


def test_names_that_are_suffixes_of_others_have_distinct_kinds() -> None:
    names = ["x.0.output.dense", "x.0.dense", "dense"]
    kinds = [kind for kind, _ in layer_table(names).values()]
    assert len(set(kinds)) == 3


def test_experts_and_blocks_of_a_stage_share_a_kind() -> None:
    kinds = {
        "m.0.moe.experts.0.up": "experts.*.up",
        "m.0.moe.experts.1.up": "experts.*.up",
        "m.1.moe.experts.0.up": "experts.*.up",
        "m.0.moe.shared.up": "shared.up",
        "m.0.moe.experts.0.down": "down",
        "m.0.mlp.0": "mlp.0",
        "m.0.mlp.2": "mlp.2",
        "head": "head",
    }
    assert module_kinds(kinds) == kinds
    stages = [f"layers.{stage}.blocks.{block}.query" for stage in (0, 1) for block in (0, 1)]
    assert set(module_kinds(stages).values()) == {"query"}

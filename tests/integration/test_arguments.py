"""What of a batch goes to ``forward``: by which names, as one argument, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_kernels import EvaTypeError, EvaValueError
from eva_peft.arguments import as_one_argument, by_name, check_known
from integration.conftest import make_llama

IDS = 3 + torch.arange(8).reshape(2, 4)
MASK = torch.ones(2, 4, dtype=torch.long)
LABELS = torch.tensor([[-100, 1, 2, 3], [-100, -100, 2, 1]])
TYPES = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
PLACES = torch.arange(4).expand(2, 4)
ADDITIVE = torch.zeros(2, 4, 4).masked_fill(torch.ones(4, 4).tril() == 0, -torch.inf)
VALUES = torch.linspace(0.1, 0.8, 8).reshape(2, 4)


def of_text(
    input_ids: Tensor,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    *,
    labels: Any = None,
) -> None: ...


def without_labels(input_ids: Tensor, attention_mask: Any = None) -> None: ...


def with_required_types(input_ids: Tensor, token_type_ids: Tensor) -> None: ...


def labels_second(input_ids: Tensor, labels: Any = None) -> None: ...


def places_first(position_ids: Any = None, attention_mask: Any = None) -> None: ...


def mask_by_name(input_ids: Tensor, *, attention_mask: Any = None) -> None: ...


def of_any(input_ids: Tensor, *rest: Tensor) -> None: ...


def by_name_alone(**inputs: Tensor) -> None: ...


# forward, the batch, and what is made of it: (names of its first parts, where the labels are),
# how many first parts stay positional, or that it is left as it is
Case = tuple[Callable[..., None], tuple[Tensor, ...], Any]
TEXT = ("input_ids", "attention_mask")
CASES: dict[str, Case] = {
    "ids": (of_text, (IDS,), 1),
    "ids and mask": (of_text, (IDS, MASK), (TEXT, None)),
    "labels": (of_text, (IDS, MASK, LABELS), (TEXT, 2)),
    "labels alone": (of_text, (IDS, torch.full((2, 4), -100)), (TEXT[:1], 1)),
    "labels and more": (of_text, (IDS, MASK, LABELS, torch.ones(2)), (TEXT, 2)),
    "scores": (of_text, (IDS, MASK, torch.rand(2)), (TEXT, None)),
    "weights": (of_text, (IDS, MASK, VALUES), (TEXT, None)),
    "as many types as there are": (of_text, (IDS, MASK, TYPES + 1), (TEXT, 2)),
    "types and places": (
        of_text,
        (IDS, MASK, TYPES, PLACES),
        ((*TEXT, "token_type_ids", "position_ids"), None),
    ),
    "an additive mask": (of_text, (IDS, ADDITIVE), (TEXT, None)),
    "other samples": (of_text, (IDS, MASK, torch.arange(3)), "as it is"),
    "labels and other samples": (of_text, (IDS, MASK, LABELS, torch.arange(3)), "as it is"),
    "labels that are not taken": (without_labels, (IDS, MASK, LABELS), (TEXT, None)),
    "labels twice": (labels_second, (IDS, LABELS, MASK), (("input_ids", "labels"), None)),
    "what is required": (with_required_types, (IDS, IDS.clone()), 2),
    "the first part": (places_first, (IDS, MASK), (("position_ids", "attention_mask"), None)),
    "a mask by name alone": (mask_by_name, (IDS, MASK), 1),
    "any parts": (of_any, (IDS, MASK), "as it is"),
    "no positional part": (by_name_alone, (IDS,), "as it is"),
    "integers beside values": (without_labels, (VALUES, 3 * MASK), 1),
}


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("case", CASES)
def test_positional_parts(case: str, kind: Any) -> None:
    forward, parts, expected = CASES[case]
    model: Any = nn.Module()
    model.forward, model.config = forward, SimpleNamespace(type_vocab_size=2)
    batch = kind(parts)
    found = by_name(batch, model)
    if expected == "as it is":
        assert found is batch
    elif isinstance(expected, int):
        assert isinstance(found, tuple)
        assert list(map(id, found)) == list(map(id, parts[:expected]))
    else:
        names, labels = expected
        wanted = dict(zip(names, parts, strict=False))
        wanted |= {} if labels is None else {"labels": parts[labels]}
        assert {name: id(part) for name, part in found.items()} == {
            name: id(part) for name, part in wanted.items()
        }


def of_features(features: dict[str, Any], scale: float = 1.0) -> None: ...


def test_a_mapping_is_one_argument_where_no_name_of_it_is_known() -> None:
    model: Any = nn.Module()
    model.forward = of_features
    batch = {"input_ids": IDS}
    assert as_one_argument(batch, model) is batch
    refused = [(model, b) for b in ({"features": IDS, "more": IDS}, (IDS, IDS), IDS)]
    for each, other in [*refused, (nn.Sequential(), batch)]:
        with pytest.raises(EvaTypeError, match="pass forward_fn"):
            as_one_argument(other, each)


def test_errors_are_explained_where_no_name_is_known() -> None:
    own, model = KeyError("mine"), make_llama()
    with pytest.raises(EvaTypeError, match=r"names \['mine'\].*it failed with KeyError"):
        check_known({"mine": IDS}, model, own)
    plain: Any = nn.Module()
    plain.forward = of_text
    known = EvaValueError("ours"), torch.OutOfMemoryError("full")
    for names, of, error in (
        (["mine", "input_ids"], model, own),
        ([], model, own),
        (["mine"], plain, own),
        *((["mine"], model, error) for error in known),
    ):
        check_known(dict.fromkeys(names), of, error)  # it may be about something else

"""Which entries of a batch reach ``forward``: by name, as one argument, or not at all."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

from eva_kernels import EvaTypeError
from eva_peft.inputs.arguments import as_one_argument, positional_to_named
from eva_peft.model.architecture import forward_signature
from integration.conftest import (
    lora,
    make_llama,
    make_mlp,
    run,
    text_batches,
    vectors,
)

IDS = 3 + torch.arange(8).reshape(2, 4)
MASK = torch.ones(2, 4, dtype=torch.long)
LABELS = torch.tensor([[-100, 1, 2, 3], [-100, -100, 2, 1]])
TYPES = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
POSITIONS = torch.arange(4).expand(2, 4)
ADDITIVE = torch.zeros(2, 4, 4).masked_fill(torch.ones(4, 4).tril() == 0, -torch.inf)
VALUES = torch.linspace(0.1, 0.8, 8).reshape(2, 4)
TEXTS = text_batches(4)
CONFIG = {"target_modules": ["0", "2"], "tau": 1.0}


def takes_text(
    input_ids: Tensor,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    *,
    labels: Any = None,
) -> None: ...


def takes_two_texts(
    input_ids: Tensor,
    attention_mask: Any = None,
    decoder_input_ids: Any = None,
    *,
    labels: Any = None,
) -> None: ...


def takes_embeddings(
    input_ids: Tensor, attention_mask: Any = None, inputs_embeds: Any = None, labels: Any = None
) -> None: ...


def takes_images(
    pixel_values: Tensor, output_attentions: Any = None, labels: Any = None
) -> None: ...


def with_features(
    input_ids: Tensor, attention_mask: Any = None, input_features: Any = None
) -> None: ...


def takes_cache(
    input_ids: Tensor, past_key_values: Any = None, attention_mask: Any = None, labels: Any = None
) -> None: ...


def without_labels(input_ids: Tensor, attention_mask: Any = None) -> None: ...


def required_types(input_ids: Tensor, token_type_ids: Tensor) -> None: ...


def labels_second(input_ids: Tensor, labels: Any = None) -> None: ...


def with_targets(ids: Tensor, targets: Any = None) -> None: ...


def positions_first(position_ids: Any = None, attention_mask: Any = None) -> None: ...


def keyword_mask(input_ids: Tensor, *, attention_mask: Any = None) -> None: ...


def scaled(features: Tensor, scale: Any = None) -> None: ...


def takes_any(input_ids: Tensor, *rest: Tensor) -> None: ...


def keyword_only(**inputs: Tensor) -> None: ...


# forward, the batch, and the expected result: (names of the first parts, index of the labels),
# the number of first parts that stay positional, or that the batch is unchanged
Case = tuple[Callable[..., None], tuple[Tensor, ...], Any]
TEXT = ("input_ids", "attention_mask")
TO_TYPES = (*TEXT, "token_type_ids"), 3
CASES: dict[str, Case] = {
    "ids": (takes_text, (IDS,), 1),
    "ids and mask": (takes_text, (IDS, MASK), (TEXT, None)),
    "labels": (takes_text, (IDS, MASK, LABELS), (TEXT, 2)),
    "labels alone": (takes_text, (IDS, torch.full((2, 4), -100)), (TEXT[:1], 1)),
    "labels and more": (takes_text, (IDS, MASK, LABELS, torch.ones(2)), (TEXT, 2)),
    "scores": (takes_text, (IDS, MASK, torch.rand(2)), (TEXT, None)),
    "weights": (takes_text, (IDS, MASK, VALUES), (TEXT, None)),
    "ids outside the token types": (takes_text, (IDS, MASK, TYPES + 1), (TEXT, 2)),
    "types and positions": (
        takes_text,
        (IDS, MASK, TYPES, POSITIONS),
        ((*TEXT, "token_type_ids", "position_ids"), None),
    ),
    "a mask of the loss": (takes_text, (IDS, MASK, 0 * TYPES, MASK - TYPES), TO_TYPES),
    "an additive mask": (takes_text, (IDS, ADDITIVE), (TEXT, None)),
    "other samples": (takes_text, (IDS, MASK, torch.arange(3)), "unchanged"),
    "labels and other samples": (takes_text, (IDS, MASK, LABELS, torch.arange(3)), "unchanged"),
    "labels that forward does not take": (without_labels, (IDS, MASK, LABELS), (TEXT, 2)),
    "labels that make a decoder's inputs": (takes_two_texts, (IDS, MASK, LABELS), (TEXT, 2)),
    "a decoder's inputs and labels": (
        takes_two_texts,
        (IDS, MASK, IDS, LABELS),
        ((*TEXT, "decoder_input_ids"), 3),
    ),
    "classes in place of a decoder's inputs": (
        takes_two_texts,
        (IDS, MASK, torch.arange(2)),
        (TEXT, 2),
    ),
    "classes in place of embeddings": (takes_embeddings, (IDS, MASK, torch.arange(2)), (TEXT, 2)),
    "scores in place of embeddings": (takes_embeddings, (IDS, MASK, torch.ones(2)), (TEXT, None)),
    "embeddings": (
        takes_embeddings,
        (IDS, MASK, torch.ones(2, 4, 8)),
        ((*TEXT, "inputs_embeds"), None),
    ),
    "classes in place of a cache": (takes_cache, (IDS, torch.arange(2)), (TEXT[:1], 1)),
    "features of a module of the user's": (
        with_features,
        (IDS, MASK, VALUES),
        ((*TEXT, "input_features"), None),
    ),
    "classes in place of features": (with_features, (IDS, MASK, LABELS[:, 0]), (TEXT, None)),
    "classes in place of a flag": (
        takes_images,
        (VALUES, torch.arange(2)),
        (("pixel_values",), 1),
    ),
    "targets that forward takes": (with_targets, (IDS, LABELS), (("ids", "targets"), 1)),
    "targets that hide no token": (with_targets, (IDS, IDS + 1), 2),
    "labels twice": (labels_second, (IDS, LABELS, MASK), (("input_ids", "labels"), None)),
    "required types": (required_types, (IDS, IDS.clone()), 2),
    "ids for another first argument": (
        positions_first,
        (IDS, MASK),
        (("position_ids", "attention_mask"), None),
    ),
    "keyword-only mask": (keyword_mask, (IDS, MASK), 1),
    "optional values of another shape": (scaled, (VALUES, torch.ones(2, 1)), 2),
    "any positional parts": (takes_any, (IDS, MASK), "unchanged"),
    "no positional part": (keyword_only, (IDS,), "unchanged"),
    "integers beside values": (without_labels, (VALUES, 3 * MASK), 1),
}


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("case", CASES)
def test_positional_parts_are_assigned_to_arguments(case: str, kind: Any) -> None:
    forward, parts, expected = CASES[case]
    model: Any = nn.Module()
    model.forward, model.config = forward, SimpleNamespace(type_vocab_size=2)
    batch = kind(parts)
    found = positional_to_named(batch, model)
    if expected == "unchanged":
        assert found is batch
    elif isinstance(expected, int):
        assert isinstance(found, tuple)
        assert list(map(id, found)) == list(map(id, parts[:expected]))
    else:
        names, labels = expected
        expected_parts = dict(zip(names, parts, strict=False))
        expected_parts |= {} if labels is None else {"labels": parts[labels]}
        assert {name: id(part) for name, part in found.items()} == {
            name: id(part) for name, part in expected_parts.items()
        }


def test_mask_in_place_of_a_cache_is_refused() -> None:
    model: Any = nn.Module()
    model.forward, model.config = takes_cache, SimpleNamespace()
    with pytest.raises(EvaTypeError, match="a batch with a mask in place of past_key_values"):
        positional_to_named((IDS, MASK, LABELS), model)


def test_module_without_config_may_take_a_tensor_as_its_cache() -> None:
    model: Any = nn.Module()
    model.forward = takes_cache
    found = positional_to_named((IDS, VALUES, MASK), model)
    assert {name: id(part) for name, part in found.items()} == {
        "input_ids": id(IDS),
        "past_key_values": id(VALUES),
        "attention_mask": id(MASK),
    }


def test_positions_of_ones_and_zeros_are_no_misplaced_mask() -> None:
    model: Any = nn.Module()
    model.forward, model.config = takes_positions, SimpleNamespace()
    ids, positions = IDS[:, :2], torch.arange(2).expand(2, 2)
    assert positional_to_named((ids, positions), model) == (ids,)


def takes_positions(input_ids: Tensor, position_ids: Any = None) -> None: ...


def takes_features(features: dict[str, Any], scale: float = 1.0) -> None: ...


def test_mapping_is_one_argument_where_forward_takes_no_key() -> None:
    model: Any = nn.Module()
    model.forward = takes_features
    batch = {"input_ids": IDS}
    assert as_one_argument(batch, model) is batch
    refused = [(model, b) for b in ({"features": IDS, "more": IDS}, (IDS, IDS), IDS)]
    for each, other in [*refused, (nn.Sequential(), batch)]:
        with pytest.raises(EvaTypeError, match="pass forward_fn"):
            as_one_argument(other, each)


def test_error_names_the_argument_that_a_batch_lacks() -> None:
    class NeedsTask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(20, 4)

        def forward(self, x: Tensor, *, task: str) -> Tensor:
            return self.inner(x)

    for batch in (vectors()[0], {"x": vectors()[0]}):
        with pytest.raises(EvaTypeError, match=r"does not take a batch.*argument: 'task'.*Let the"):
            run(NeedsTask(), [batch], lora(target_modules=["inner"]))


def test_batch_with_a_to_method_is_one_argument() -> None:
    class Graphs:  # as in torch_geometric
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def to(self, device: torch.device) -> Graphs:
            return Graphs(self.x.to(device))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = make_mlp()

        def forward(self, graphs: Graphs) -> Tensor:
            return self.mlp(graphs.x)

    config, data = lora(target_modules=["mlp.0", "mlp.2"], tau=1.0), vectors(4)
    found = run(Net(), [Graphs(x) for x in data], config, max_steps=4)
    expected = run(make_mlp(), data, lora(**CONFIG), max_steps=4)
    assert torch.equal(found.components["mlp.2"], expected.components["2"])


def test_dataclass_is_one_argument_where_forward_takes_no_field() -> None:
    @dataclass
    class Molecules:
        atoms: Tensor
        attention_mask: Tensor

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = make_mlp()

        def forward(self, molecules: Molecules) -> Tensor:
            return self.mlp(molecules.atoms)

    config, kept = lora(target_modules=["mlp.0", "mlp.2"], tau=1.0), torch.arange(20) < 13
    data = [x.reshape(2, 20, 20) for x in vectors(4)]
    batches = [Molecules(x, kept.expand(2, 20)) for x in data]
    found = run(Net(), batches, config, max_steps=4, method="gram")
    parts = [x[:, kept].flatten(0, 1) for x in data]
    expected = run(make_mlp(), parts, lora(**CONFIG), max_steps=4, method="gram")
    torch.testing.assert_close(found.components["mlp.2"], expected.components["2"])
    assert found.tokens == expected.tokens == 4 * 26


class WithMask(nn.Module):
    """Takes a mask after the input, as timm models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_mlp()
        self.received: list[Tensor | None] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.received.append(mask)
        return self.body(x)


@pytest.mark.parametrize(
    "target",
    [
        torch.arange(40) % 4,
        torch.rand(40),
        torch.rand(40, 1),
        torch.rand(40, 4) + 0.1,
        torch.arange(40)[:, None] % 4,
    ],
)
def test_targets_are_not_passed_as_masks(target: Tensor) -> None:
    model, config = WithMask(), lora(target_modules=["body.0", "body.2"], tau=1.0)
    result = run(model, iter([(x, target) for x in vectors()]), config, method="gram")
    assert model.received == [None] * 8
    expected = run(make_mlp(), iter(vectors()), lora(**CONFIG), method="gram")
    for name, rows in expected.components.items():
        assert torch.equal(rows, result.components[f"body.{name}"])


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(40, 20, dtype=torch.long).tril(),
        torch.ones(40, 20).bool(),
        torch.zeros(40, 20).masked_fill(torch.eye(40, 20).bool(), -torch.inf),
    ],
)
def test_positional_masks_are_passed_as_masks(mask: Tensor) -> None:
    model = WithMask()
    run(model, iter([(x, mask) for x in vectors()]), lora(target_modules=["body.0"]))
    assert all(received is mask for received in model.received)


@pytest.mark.parametrize(
    "parts",
    [
        ("input_ids", "labels"),
        ("input_ids", "attention_mask", "labels"),
        ("input_ids", "attention_mask", "copy"),
        ("input_ids", "attention_mask", "next"),
        ("input_ids", "attention_mask", "class"),
    ],
)
def test_labels_in_a_tuple_mask_tokens(parts: tuple[str, ...]) -> None:
    texts = text_batches(4, labels=True)
    for batch in texts:
        batch["labels"][:, :5] = -100
        batch["copy"], batch["class"] = batch["input_ids"].clone(), torch.arange(4) % 2
        batch["next"] = batch["input_ids"].roll(-1, 1)
    received: list[Any] = []
    model, config = make_llama(), lora(tau=1.0, target_modules=["q_proj"])

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        received.append({k for k, v in kwargs.items() if v is not None} | {"args"[len(args) :]})

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    loader = [tuple(batch[key] for key in parts) for batch in texts]
    result = run(model, iter(loader), config, method="gram", early_exit=False)
    handle.remove()
    kept = ["input_ids", *[p for p in parts if p in ("attention_mask", "labels")]]
    expected = run(make_llama(), iter([{k: b[k] for k in kept} for b in texts]), config)
    assert result.tokens == expected.tokens
    assert all("position_ids" not in names for names in received)


@pytest.mark.parametrize("third", ["class of each token", "types"])
def test_token_labels_are_not_passed_as_token_types(third: str) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = BertConfig(**size, num_attention_heads=2, num_labels=5)  # two token types
    received: list[Any] = []
    model = BertForTokenClassification(config)
    model.bert.embeddings.token_type_embeddings.register_forward_pre_hook(
        lambda module, args: received.append(args[0])
    )
    texts = text_batches(2, padded=False)
    marks = torch.arange(24).expand(4, 24) % (5 if third == "class of each token" else 2)
    loader = [(b["input_ids"], b["attention_mask"], marks) for b in texts]
    run(model, iter(loader), lora(target_modules=["query"]))
    assert [bool(types.any()) for types in received] == [third == "types"] * 2


class TakesMapping(nn.Module):
    """Takes a mapping, as a SentenceTransformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_llama()

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        return {**features, "out": self.body(**features)}


def test_mapping_as_single_argument_gives_the_same_result() -> None:
    texts, config = text_batches(4), lora(target_modules=["q_proj"], tau=1.0)
    result = run(TakesMapping(), iter(texts), config, method="gram")
    expected = run(make_llama(), iter(texts), config, method="gram")
    assert result.tokens == expected.tokens
    for name, rows in expected.components.items():
        assert torch.equal(rows, result.components[f"body.{name}"])


def test_forward_without_a_signature() -> None:
    class Compiled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    Compiled.forward.__signature__ = "none"  # type: ignore[attr-defined]
    x, config = vectors()[0], lora(target_modules=["0"])
    for batch in (x, (x,), {"x": x, "names": ["a", "b"]}):
        assert run(Compiled(nn.Linear(20, 4)), iter([batch]), config).tokens == len(x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        run(Compiled(nn.Linear(20, 4)), [{"y": x}], config)


def test_string_columns_are_dropped_unless_forward_names_them() -> None:
    class StyledLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(20, 20)

        def forward(self, x: Tensor, style: str, **others: Any) -> Tensor:
            received.append((style, others))
            return self.lin(x)

    received: list[Any] = []
    x = vectors(1)[0]
    batch = {"x": x, "style": "plain", "text": ["a"] * 40, "source": "a file", "scale": 2}
    run(StyledLinear(), iter([batch]), lora(target_modules=["lin"]))
    assert received == [("plain", {"scale": 2})]


def test_forward_signature_is_cached_without_keeping_the_method() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x

    first, second = Part(), Part()
    found = forward_signature(first)
    assert found is not None
    assert list(found.parameters) == ["x", "mask"]
    assert forward_signature(second) is found
    second.forward = lambda x: x
    Part.forward = lambda self, a, b: a  # type: ignore[assignment]
    for part, names in ((second, ["x"]), (first, ["a", "b"])):
        now = forward_signature(part)
        assert now is not None
        assert list(now.parameters) == names
    method = weakref.ref(Part.forward)
    del first, second, part, Part
    gc.collect()
    assert method() is None

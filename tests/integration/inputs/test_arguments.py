"""What of a batch goes to ``forward``: by which names, as one argument, or not at all."""

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
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaForCausalLM,
)

from eva_kernels import EvaTypeError, EvaValueError
from eva_peft.inputs.arguments import as_one_argument, positional_to_named, raise_if_names_unknown
from eva_peft.model.architecture import forward_signature
from integration.conftest import lora, make_llama, make_mlp, run, text_batches, vectors

IDS = 3 + torch.arange(8).reshape(2, 4)
MASK = torch.ones(2, 4, dtype=torch.long)
LABELS = torch.tensor([[-100, 1, 2, 3], [-100, -100, 2, 1]])
TYPES = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
PLACES = torch.arange(4).expand(2, 4)
ADDITIVE = torch.zeros(2, 4, 4).masked_fill(torch.ones(4, 4).tril() == 0, -torch.inf)
VALUES = torch.linspace(0.1, 0.8, 8).reshape(2, 4)
TEXTS = text_batches(4)
CONFIG = {"target_modules": ["0", "2"], "tau": 1.0}


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
    found = positional_to_named(batch, model)
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


def test_a_batch_that_can_be_moved_is_one_argument() -> None:
    class Graphs:  # as torch_geometric's
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


def test_a_dataclass_is_one_argument_where_no_name_of_it_is_known() -> None:
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


def test_errors_are_explained_where_no_name_is_known() -> None:
    own, model = KeyError("mine"), make_llama()
    with pytest.raises(EvaTypeError, match=r"names \['mine'\].*it failed with KeyError"):
        raise_if_names_unknown({"mine": IDS}, {"mine": IDS}, model, own)
    plain: Any = nn.Module()
    plain.forward = of_text
    known = EvaValueError("ours"), torch.OutOfMemoryError("full")
    for names, of, error in (
        (["mine", "input_ids"], model, own),
        ([], model, own),
        (["mine"], plain, own),
        *((["mine"], model, error) for error in known),
    ):
        batch = dict.fromkeys(names)
        raise_if_names_unknown(batch, batch, of, error)  # it may be about something else


class Around(LlamaForCausalLM):
    """Its ``forward`` tells no names that it takes, or not all of them."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(make_llama().config)
        self.error = error

    def forward(self, flag: bool = False, **inputs: Any) -> Any:
        raise self.error or AssertionError


class Decorated(Around):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error or AssertionError


def test_errors_of_models_that_hand_any_name_on() -> None:
    config = lora(target_modules=["q_proj"])
    full = torch.OutOfMemoryError("CUDA out of memory")
    for kind in (Around, Decorated):
        with pytest.raises(torch.OutOfMemoryError, match="out of memory on cpu"):
            run(kind(full), TEXTS, config)
    with pytest.raises(KeyError, match="mine"):
        run(Decorated(KeyError("mine")), TEXTS, config)
    with pytest.raises(TypeError, match=r"names .*\(it failed with KeyError\('mine'\)\). Let"):
        run(Around(KeyError("mine")), TEXTS, config)


class FailsLater(Around):
    """It hands on any name, and fails once it has run."""

    def forward(self, flag: bool = False, **inputs: Any) -> Any:
        error, self.error = self.error, KeyError("mine")
        return LlamaForCausalLM.forward(self, **inputs) if error is None else super().forward()


def test_names_that_a_model_has_taken_once_are_known() -> None:
    with pytest.raises(KeyError, match="mine"):
        run(FailsLater(None), TEXTS, lora(target_modules=["q_proj"]))


class WithMask(nn.Module):
    """Takes a mask after the input, as models of timm do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_mlp()
        self.seen: list[Tensor | None] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen.append(mask)
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
def test_targets_are_no_masks(target: Tensor) -> None:
    model, config = WithMask(), lora(target_modules=["body.0", "body.2"], tau=1.0)
    result = run(model, iter([(x, target) for x in vectors()]), config, method="gram")
    assert model.seen == [None] * 8
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
def test_masks_are_masks(mask: Tensor) -> None:
    model = WithMask()
    run(model, iter([(x, mask) for x in vectors()]), lora(target_modules=["body.0"]))
    assert all(seen is mask for seen in model.seen)


@pytest.mark.parametrize(
    "parts",
    [
        ("input_ids", "labels"),
        ("input_ids", "attention_mask", "labels"),
        ("input_ids", "attention_mask", "copy"),
        ("input_ids", "attention_mask", "class"),
    ],
)
def test_labels_in_a_tuple(parts: tuple[str, ...]) -> None:
    texts = text_batches(4, labels=True)
    for batch in texts:
        batch["labels"][:, :5] = -100
        batch["copy"], batch["class"] = batch["input_ids"].clone(), torch.arange(4) % 2
    seen: list[Any] = []
    model, config = make_llama(), lora(tau=1.0, target_modules=["q_proj"])

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append({k for k, v in kwargs.items() if v is not None} | {"args"[len(args) :]})

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    loader = [tuple(batch[key] for key in parts) for batch in texts]
    result = run(model, iter(loader), config, method="gram", early_exit=False)
    handle.remove()
    kept = ["input_ids", *[p for p in parts if p in ("attention_mask", "labels")]]
    expected = run(make_llama(), iter([{k: b[k] for k in kept} for b in texts]), config)
    assert result.tokens == expected.tokens
    assert all("position_ids" not in names for names in seen)


@pytest.mark.parametrize("third", ["class of each", "types"])
def test_labels_of_tokens_are_no_types(third: str) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = BertConfig(**size, num_attention_heads=2, num_labels=5)  # of two types
    seen: list[Any] = []
    model = BertForTokenClassification(config)
    model.bert.embeddings.token_type_embeddings.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    texts = text_batches(2, padded=False)
    marks = torch.arange(24).expand(4, 24) % (5 if third == "class of each" else 2)
    loader = [(b["input_ids"], b["attention_mask"], marks) for b in texts]
    run(model, iter(loader), lora(target_modules=["query"]))
    assert [bool(types.any()) for types in seen] == [third == "types"] * 2


def test_token_ids_that_are_not_collated_are_no_labels() -> None:
    with pytest.raises((IndexError, TypeError, ValueError, RuntimeError)):
        run(make_llama(), iter([list(torch.arange(24).reshape(3, 8) + 1)]), lora())


class OfOne(nn.Module):
    """Takes a mapping, as a SentenceTransformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_llama()

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        return {**features, "out": self.body(**features)}


def test_a_mapping_as_the_one_argument() -> None:
    texts, config = text_batches(4), lora(target_modules=["q_proj"], tau=1.0)
    result = run(OfOne(), iter(texts), config, method="gram")
    expected = run(make_llama(), iter(texts), config, method="gram")
    assert result.tokens == expected.tokens
    for name, rows in expected.components.items():
        assert torch.equal(rows, result.components[f"body.{name}"])


def test_batches_that_forward_does_not_take() -> None:
    class OfTwo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(20, 4)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.lin(sample)

    model, config = OfTwo(), lora(target_modules=["lin"])
    for batch, told in (({"pixel_values": vectors()[0]}, "pixel_v"), (vectors()[0], "its values")):
        with pytest.raises(EvaTypeError, match=rf"OfTwo\.forward\(.*{told}.*pass forward_fn"):
            run(model, iter([batch]), config)
    assert not model.lin._forward_pre_hooks


@pytest.mark.parametrize("looks", [False, True])
def test_a_mapping_for_a_model_of_one_tensor_is_explained(looks: bool) -> None:
    class OfOneTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.lin = nn.Embedding(9, 20), nn.Linear(20, 4)

        def forward(self, idx: Tensor) -> Tensor:
            return self.lin(self.words(idx.flatten() if looks else idx))

    told = r"OfOneTensor.*not take.* names \['input_ids', 'labels'\].*dict.*pass forward_fn"
    with pytest.raises(EvaTypeError, match=told):
        run(OfOneTensor(), [{"input_ids": IDS, "labels": IDS}], lora())


def test_a_type_error_of_the_model_s_own_is_left_to_it() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(20, 4)

        def forward(self, sample: Any) -> Tensor:
            sample = sample["x"] if isinstance(sample, dict) else sample
            return self.lin(sample + "a word")

    for batch in (vectors()[0], {"sample": vectors()[0]}, {"x": vectors()[0]}):
        with pytest.raises(TypeError, match=r"^unsupported operand"):
            run(Wrong(), iter([batch]), lora(target_modules=["lin"]))


@pytest.mark.parametrize("later", [False, True])
def test_an_error_that_is_not_about_the_mapping_is_left_to_the_model(later: bool) -> None:
    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(20, 4)

        def forward(self, sample: Any) -> Tensor:
            return self.lin(torch.tanh(sample["x"]), **{} if later else {"return_dict": True})

    batches = [{"x": x} for x in vectors(2)]
    with pytest.raises(TypeError, match="must be Tensor, not dict$" if later else "'return_dict'$"):
        run(Passing(), [*batches, {"x": batches[0]}], lora(target_modules=["lin"]))


def test_a_batch_of_nothing_but_text_and_labels_is_explained() -> None:
    batch = {"prompt": ["a", "b"], "labels": torch.ones(2, 9).long()}
    with pytest.raises(EvaTypeError, match=r"Llama.* not take .*names \['labels', 'prompt'\]"):
        run(make_llama(), [batch], lora())


def test_columns_of_text_stay_behind_unless_forward_names_them() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(20, 20)

        def forward(self, x: Tensor, style: str, **others: Any) -> Tensor:
            seen.append((style, others))
            return self.lin(x)

    seen: list[Any] = []
    x = vectors(1)[0]
    batch = {"x": x, "style": "plain", "text": ["a"] * 40, "source": "a file", "scale": 2}
    run(Told(), iter([batch]), lora(target_modules=["lin"]))
    assert seen == [("plain", {"scale": 2})]


def test_what_a_method_takes_is_looked_at_once_and_does_not_keep_it() -> None:
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

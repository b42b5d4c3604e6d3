"""Loaders and batches of every kind, none of which is kept alive."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import defaultdict, namedtuple
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import (
    BatchEncoding,
)

import eva_kernels
from eva_peft.inputs import batches
from eva_peft.inputs.batches import without_padding
from eva_peft.model.architecture import architecture_of
from integration.conftest import angle, lora, make_llama, make_mlp, run, text_batches, vectors

TEXTS = text_batches(4)
CONFIG = {"target_modules": ["0", "2"], "tau": 1.0}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.cat(vectors()))


@dataclass
class Sample:
    input_ids: Tensor
    attention_mask: Tensor


@dataclass
class Derived:
    x: Tensor
    size: int = field(init=False, default=0)


class Endless:
    def __iter__(self) -> Iterator[Tensor]:
        return itertools.cycle(vectors())


LOADERS = {
    "list": lambda: vectors(),
    "tuple": lambda: tuple(vectors()),
    "DataLoader": lambda: DataLoader(
        TensorDataset(torch.cat(vectors())),
        batch_size=40,
        collate_fn=lambda b: torch.stack([x for (x,) in b]),
    ),
    "generator": lambda: (x for x in vectors()),
    "IterableDataset": lambda: DataLoader(Stream(), batch_size=40),
    "infinite": Endless,
    "map": lambda: map(torch.clone, vectors()),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_every_kind_of_loader_gives_the_same_result(kind: str) -> None:
    expected = run(make_mlp(), vectors(), lora(**CONFIG), max_steps=8, method="gram")
    result = run(make_mlp(), LOADERS[kind](), lora(**CONFIG), max_steps=8, method="gram")
    assert result.forwards == 8
    assert result.tokens == 320
    for name, rows in expected.components.items():
        assert torch.equal(rows, result.components[name])


def as_dataclass(batch: dict[str, Tensor]) -> Any:
    return Sample(**batch)


def as_user_dict(batch: dict[str, Tensor]) -> Any:
    class Mine(dict):
        pass

    return Mine(batch)


class Samples(MutableMapping):
    """As a TensorDict: a mapping that iterates over its samples, and that can be moved."""

    batch_size: tuple[int, ...] = ()

    def __init__(self, parts: dict[str, Tensor], batch_size: tuple[int, ...] = ()) -> None:
        self.parts, self.batch_size = parts, batch_size

    def to(self, device: torch.device) -> Samples:
        return Samples({k: v.to(device) for k, v in self.parts.items()}, self.batch_size)

    def keys(self) -> Any:
        return self.parts.keys()

    def items(self) -> Any:
        return self.parts.items()

    def values(self) -> Any:
        return self.parts.values()

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.parts[key]
        return Samples({k: v[key] for k, v in self.items()})

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.parts[key] = value

    def __delitem__(self, key: str) -> None:
        del self.parts[key]

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return self.batch_size[0]

    def __repr__(self) -> str:
        return f"Samples({self.parts})"


def as_tensor_dict(batch: dict[str, Tensor]) -> Any:
    return Samples(batch, tuple(batch["input_ids"].shape[:1]))


class TakesWhole(nn.Module):
    """Reads attributes that a plain dict does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_llama()

    def forward(self, batch: Any) -> Any:
        names = ("input_ids", "attention_mask")
        if isinstance(batch, Samples):
            assert batch.batch_size == (len(batch["input_ids"]),)
            return self.inner(**{name: batch[name] for name in names})
        return self.inner(**{name: getattr(batch, name) for name in names})


@pytest.mark.parametrize("make", [BatchEncoding, as_dataclass, as_tensor_dict])
def test_batch_keeps_its_type_where_the_model_takes_it_whole(make: Any) -> None:
    config = lora(tau=1.0, target_modules=["q_proj"])
    expected = run(make_llama(), iter(TEXTS), config, method="gram")
    result = run(TakesWhole(), (make(b) for b in TEXTS), config, method="gram")
    assert result.tokens == expected.tokens
    for name, rows in expected.components.items():
        torch.testing.assert_close(rows, result.components[f"inner.{name}"])


def test_tensor_dict_is_kept_where_an_optional_argument_is_named_after_it() -> None:
    """As in tensordict's modules: by name, the parts that they do not read would be refused."""

    class ReadsSome(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_mlp()

        def forward(self, samples: Any = None, **parts: Tensor) -> Any:
            if samples is None:
                return self.inner(**parts)
            samples["out"] = self.inner(samples["x"])
            return samples["out"]

    data = [Samples({"x": x, "reward": x[:, :1]}, (len(x),)) for x in vectors()]
    result = run(ReadsSome(), data, lora(**CONFIG), method="gram", max_steps=8)
    expected = run(make_mlp(), iter(vectors()), lora(**CONFIG), method="gram", max_steps=8)
    for name, rows in expected.components.items():
        assert torch.equal(rows, result.components[f"inner.{name}"])
    assert all(set(samples.keys()) == {"x", "reward"} for samples in data)


@pytest.mark.parametrize("make", [dict, BatchEncoding, as_dataclass, as_user_dict, as_tensor_dict])
def test_every_kind_of_masked_batch_gives_the_same_result(make: Any) -> None:
    expected = run(make_llama(), iter(TEXTS), lora(tau=1.0), method="gram")
    result = run(make_llama(), (make(b) for b in TEXTS), lora(tau=1.0), method="gram")
    assert result.tokens == expected.tokens
    for name, rows in expected.components.items():
        assert torch.equal(rows, result.components[name])


Pair = namedtuple("Pair", "x extra")


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x,), lambda x: [x]])
def test_positional_batches(make: Any) -> None:
    result = run(make_mlp(), (make(x) for x in vectors()), lora(**CONFIG), method="gram")
    expected = run(make_mlp(), iter(vectors()), lora(**CONFIG), method="gram")
    for name, rows in expected.components.items():
        assert torch.equal(rows, result.components[name])


def test_targets_beside_the_input_are_left_out() -> None:
    x = torch.cat(vectors())
    loader = DataLoader(TensorDataset(x, torch.arange(len(x))), batch_size=40)
    result = run(make_mlp(), loader, lora(**CONFIG), method="gram", max_steps=8)
    expected = run(make_mlp(), iter(vectors()), lora(**CONFIG), method="gram", max_steps=8)
    for name, rows in expected.components.items():
        assert torch.equal(rows, result.components[name])
    samples = [list(x[:2])]  # of a loader that does not collate
    with pytest.raises(TypeError, match=r"Sequential.* does not take a batch with its values"):
        run(make_mlp(), samples, lora(**CONFIG))


def test_forward_fn_gets_the_batch_unchanged() -> None:
    types: list[type] = []

    def forward(model: nn.Module, batch: Any) -> None:
        types.append(type(batch))
        model(batch[0] if isinstance(batch, tuple) else batch.input_ids.float()[:, :20])

    loader = [Pair(vectors()[0], 3), as_dataclass(TEXTS[0])]
    run(make_mlp(), iter(loader), lora(**CONFIG), forward_fn=forward)
    assert types == [Pair, Sample]


def test_forward_fn_gets_empty_batches() -> None:
    lengths: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        lengths.append(len(batch))
        model(torch.cat([batch, torch.ones(1, 20)]))

    run(make_mlp(), iter([*vectors(2), torch.empty(0, 20)]), lora(**CONFIG), forward_fn=forward)
    assert lengths == [40, 40, 0]


def test_containers_that_cannot_be_rebuilt_become_plain_ones() -> None:
    class OfTwo(list):
        def __init__(self, first: Any, second: Any) -> None:
            super().__init__([first, second])

    cpu, x = torch.device("cpu"), vectors()[0]
    mapping = batches.to_device(defaultdict(list, {"x": x, "lists": OfTwo(x, 3)}), cpu)
    assert type(mapping) is dict
    assert mapping["x"] is x
    assert mapping["lists"] == [x, 3]
    assert type(mapping["lists"]) is list
    assert batches.to_device(Derived(x), cpu).x is x
    assert batches.shape_of({"number": torch.tensor(3), "x": x}) == (40, 20)


class Graph:
    """As in torch_geometric: ``to`` moves in place and returns the object."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Graph:
        self.x = self.x.to(device)
        return self


class Molecules(Graph):
    """As in chemprop: ``to`` returns nothing."""

    def to(self, device: torch.device) -> None:  # type: ignore[override]
        super().to(device)


@pytest.mark.parametrize("kind", [Graph, Molecules])
def test_objects_are_moved_by_their_to_method(kind: type[Graph]) -> None:
    graph, packed = kind(vectors()[0]), pack_sequence(list(vectors()[0].split([4, 20, 16])), False)
    moved = batches.to_device({"graph": [graph], "packed": packed}, torch.device("meta"))
    assert (moved["graph"][0].x.device.type, graph.x.device.type) == ("meta", "cpu")
    assert moved["packed"].data.device.type == moved["packed"].sorted_indices.device.type == "meta"
    assert moved["packed"].batch_sizes.device.type == "cpu"  # where torch requires them


@pytest.mark.parametrize("kind", ["bool", "uint8", "int16", "float64"])
def test_arrays_keep_their_dtype(kind: str) -> None:
    found = batches.as_tensors({"x": np.ones((2, 3), kind), "text": np.array(["a", "b"])})
    assert found["x"].dtype == getattr(torch, kind)
    assert isinstance(found["text"], np.ndarray)
    nested = batches.as_tensors({"pixels": [[[0.5, 1.0]], [[1.5, 2.0]]]})["pixels"]
    assert nested.shape == (2, 1, 2)


def test_generator_is_iterated_once() -> None:
    with pytest.warns(eva_kernels.NotConvergedWarning, match="after 8 forward passes"):
        result = run(make_mlp(), iter(vectors()), lora(**CONFIG), on_not_converged="warn")
    assert result.forwards == 8


def test_next_epoch_is_reshuffled() -> None:
    first_values: list[float] = []

    def forward(model: nn.Module, batch: Any) -> None:
        first_values.append(float(batch[0][0, 0]))
        model(batch[0])

    loader = DataLoader(TensorDataset(torch.cat(vectors())), batch_size=40, shuffle=True)
    run(make_mlp(), loader, lora(**CONFIG), forward_fn=forward, max_steps=16)
    assert len(first_values) == 16
    assert first_values[:8] != first_values[8:]


@pytest.mark.parametrize("keys", [("input_ids", "attention_mask"), ("input_ids",)])
def test_no_batch_is_kept_alive(keys: tuple[str, ...]) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = []
    texts = text_batches(4, padded=False)

    def copies() -> Iterator[dict[str, Tensor]]:
        for i in range(5):
            gc.collect()
            most.append(sum(r() is not None for r in alive))
            batch = {k: texts[i % 4][k].clone() for k in keys}
            alive.append(weakref.ref(batch["input_ids"]))
            yield batch
            del batch

    model = make_llama()
    gc.freeze()  # the collections below visit new objects only
    try:
        result = run(model, copies(), lora(tau=1.0))
        gc.collect()
    finally:
        gc.unfreeze()
    assert result.forwards == 5
    assert most == [0] * 5  # not even the last one, while the next is made
    assert not any(r() is not None for r in alive)


def test_parts_of_a_batch_are_on_the_device_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most, original = [], batches.to_device

    def to_device(value: Any, device: torch.device) -> Any:
        if not isinstance(value, Tensor):  # a batch, whose tensors follow
            most.append(sum(r() is not None for r in alive))
            return original(value, device)
        copy = original(value, device).clone()
        alive.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(batches, "to_device", to_device)
    [long] = text_batches(1, padded=False)
    padded = {key: torch.cat([value] * 8, 1) for key, value in long.items()}
    padded["attention_mask"][1:, 6:] = 0
    run(make_llama(), [padded], lora(), max_steps=2)
    assert len(alive) == 2 * 2 * len(padded)  # two passes over two parts
    assert most == [0] * 4


def test_splitting_batches_does_not_change_the_result() -> None:
    whole = text_batches(6)
    halves = [{k: v[i : i + 2] for k, v in b.items()} for b in whole for i in (0, 2)]
    ones = [{k: v[i : i + 1] for k, v in b.items()} for b in whole for i in range(4)]
    pairs = zip(whole[::2], whole[1::2], strict=True)
    joined = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in pairs]
    shuffled = [whole[i] for i in (3, 0, 5, 1, 4, 2)]
    gram = run(make_llama(), iter(whole), lora(tau=1.0), method="gram")
    sketch = run(make_llama(), iter(whole), lora(tau=1.0), method="sketch")
    for other in (halves, ones, joined, shuffled):
        exact = run(make_llama(), iter(other), lora(tau=1.0), method="gram")
        assert exact.tokens == gram.tokens
        assert sum(abs(r - gram.ranks[n]) for n, r in exact.ranks.items()) <= 2
        close = run(make_llama(), iter(other), lora(tau=1.0), method="sketch")
        for name, values in gram.singular_values.items():
            torch.testing.assert_close(exact.singular_values[name], values, rtol=1e-4, atol=1e-4)
            gap = (values[:-1] - values[1:]) / values[:-1]
            rank = int(gap.argmax()) + 1
            rows = gram.components[name][:rank]
            assert angle(exact.components[name][:rank], rows) < 5e-4
            # the sketch forgets a little at every fold: at most 5 degrees
            assert angle(close.components[name][:rank], sketch.components[name][:rank]) < 0.087


def test_small_batches_add_up_to_a_step() -> None:
    x = torch.cat(vectors())
    result = run(make_mlp(), iter(x.split(3)), lora(**CONFIG), method="sketch")
    assert result.tokens == 320
    assert result.forwards == 107
    assert 1 < result.steps < 107  # a step is at least as many tokens as the sketch is wide
    expected = run(make_mlp(), iter([x]), lora(**CONFIG), method="gram")
    for name, values in expected.singular_values.items():
        torch.testing.assert_close(result.singular_values[name], values, rtol=0.02, atol=0.05)


def test_float64_and_half_inputs() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        data = [x.to(dtype) for x in vectors()]
        result = run(make_mlp().to(dtype), iter(data), lora(**CONFIG), method="sketch")
        assert sum(result.ranks.values()) == 8
        assert all(rows.dtype == torch.float32 for rows in result.components.values())


@pytest.mark.parametrize("kind", ["backwards", "read-only", "big-endian"])
def test_arrays_of_any_memory_layout(kind: str) -> None:
    batch = {key: value.numpy() for key, value in text_batches(1)[0].items()}
    expected = run(make_llama(), iter([batch]), lora(tau=1.0))
    if kind == "backwards":
        batch = {key: np.flip(np.flip(value, 1).copy(), 1) for key, value in batch.items()}
    elif kind == "read-only":
        for value in batch.values():
            value.flags.writeable = False
    else:
        batch = {key: value.astype(value.dtype.newbyteorder(">")) for key, value in batch.items()}
    assert run(make_llama(), iter([batch]), lora(tau=1.0)).ranks == expected.ranks


def test_one_sample_of_reversed_arrays() -> None:
    reversed_batch = {key: value.numpy()[::-1][:1] for key, value in text_batches(1)[0].items()}
    copied = {key: value.copy() for key, value in reversed_batch.items()}
    found, expected = (
        run(make_llama(), iter([batch]), lora(tau=1.0)) for batch in (reversed_batch, copied)
    )
    assert found.ranks == expected.ranks


def test_scalar_beside_no_samples_is_an_empty_batch() -> None:
    empty = {key: value[:0] for key, value in text_batches(1)[0].items()}
    empty["num_items_in_batch"] = torch.tensor(0)
    data = [empty, *text_batches(1)]
    result = run(make_llama(), data, lora(tau=1.0), forward_fn=None, max_steps=2)
    assert result.tokens == int(data[1]["attention_mask"].sum())


def test_images_prevent_splitting_by_length() -> None:
    """As many images as samples may all belong to the first sample."""
    mask = (torch.arange(300) < torch.tensor([300, 20])[:, None]).long()
    batch = {"input_ids": mask * 5, "attention_mask": mask}
    cpu, model = torch.device("cpu"), architecture_of(nn.Identity())
    assert len(without_padding(batch, cpu, model)) == 2
    mask[:, 250:] = 0
    [cut] = without_padding({**batch, "pixel_values": torch.ones(2, 3, 4, 4)}, cpu, model)
    assert cut["input_ids"].shape == (2, 250)
    assert cut["pixel_values"].shape == (2, 3, 4, 4)


def test_audio_aligned_with_text_prevents_trimming() -> None:
    """Voxtral's realtime model adds embeddings of text and of eight audio frames per token."""
    (batch,) = text_batches(1, length=24)
    batch["attention_mask"][:, 16:] = 0
    audio = {**batch, "input_features": torch.randn(4, 5, 24 * 8)}
    assert without_padding(audio, torch.device("cpu")) == [audio]
    audio = {**batch, "input_features": torch.randn(4, 5, 100)}  # of one length for every text
    (cut,) = without_padding(audio, torch.device("cpu"))
    assert cut["input_ids"].shape[1] <= 16
    assert cut["input_features"].shape == (4, 5, 100)
    boxes = {**batch, "visual_embeds": torch.randn(4, 5, 24 * 8)}  # by chance as many features
    (cut,) = without_padding(boxes, torch.device("cpu"))
    assert cut["input_ids"].shape[1] <= 16


@pytest.mark.parametrize("kind", ["fnet", "canine", "siglip", "mobilebert", "big_bird", "reformer"])
def test_no_trimming_for_models_that_see_padding(kind: str) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)
    batch = {"input_ids": mask * 5, "attention_mask": mask}
    inner, other = SimpleNamespace(model_type=kind), SimpleNamespace(model_type="bert")
    model = nn.Identity()
    for config in (inner, SimpleNamespace(model_type="pair", text_config=inner)):
        model.config = config
        for outer in (model, nn.Sequential(model)):  # also inside a user's module
            assert without_padding(batch, torch.device("cpu"), architecture_of(outer)) == [batch]
    model.config = other
    [cut] = without_padding(batch, torch.device("cpu"), architecture_of(model))
    assert cut["input_ids"].shape == (2, 3)

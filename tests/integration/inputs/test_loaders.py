"""Loaders of common libraries, and the batches that they yield."""

from __future__ import annotations

import gc
import multiprocessing
import types
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorWithFlattening
from transformers.modeling_outputs import BaseModelOutput

import eva_kernels
from eva_kernels import EvaValueError
from eva_peft.errors import EvaTypeError
from extras import needs
from integration.conftest import (
    QUIET,
    VOCABULARY,
    angle,
    exact_pca,
    hooks_of,
    layer_inputs,
    lora,
    lost,
    make_bert,
    make_llama,
    make_mlp,
    run,
    text_batches,
    vectors,
)

LAYER = "model.layers.1.mlp.down_proj"


def samples(count: int = 12, length: int = 16) -> list[dict[str, list[int]]]:
    batches = text_batches(count, 1, length, padded=False)
    return [{k: v[0].tolist() for k, v in b.items()} for b in batches]


def reference(batches: list[Any], **options: Any) -> Any:
    return run(make_llama(), iter(batches), lora(tau=1.0), method="gram", **options)


def assert_same(result: Any, expected: Any) -> None:
    assert result.tokens == expected.tokens
    assert angle(result.components[LAYER][:2], expected.components[LAYER][:2]) < 1e-3


STREAMS = {
    "samples as lists": lambda data: data,
    "samples as tensors": lambda data: data.with_format("torch"),
    "batches as lists": lambda data: data.batch(4),
    "batches as tensors": lambda data: data.with_format("torch").batch(4),
    "DataLoader": lambda data: DataLoader(data.with_format("torch"), batch_size=4),
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # datasets
@pytest.mark.parametrize("kind", STREAMS)
def test_streaming_datasets(kind: str) -> None:
    datasets = needs("datasets")
    rows = samples()
    named = [{**row, "text": f"sample {i}"} for i, row in enumerate(rows)]
    whole = [{k: torch.tensor([row[k]]) for k in row} for row in rows]
    data = datasets.IterableDataset.from_generator(lambda: iter(named))
    result = run(
        make_llama(), STREAMS[kind](data), lora(tau=1.0), method="gram", max_tokens=12 * 16
    )
    assert_same(result, reference(whole))


def test_map_style_dataset() -> None:
    datasets = needs("datasets")
    rows = samples()
    data = datasets.Dataset.from_list(rows).with_format("torch")
    result = run(
        make_llama(), DataLoader(data, batch_size=6), lora(tau=1.0), method="gram", max_steps=2
    )
    assert_same(result, reference([{k: torch.tensor([row[k]]) for k in row} for row in rows]))


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_samples_of_different_lengths_require_a_collator(kind: Callable[[Any], Any]) -> None:
    rows = [
        {"input_ids": [kind([1, 2, 3]), kind([4, 5])], "attention_mask": [kind([1] * 3), kind([1])]}
    ]
    model = make_llama()
    with pytest.raises(EvaValueError, match=r"'input_ids' .*different lengths.*collator"):
        run(model, rows)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("kind", [list, torch.as_tensor, np.array])
def test_samples_of_equal_lengths_need_no_collator(kind: Callable[[Any], Any], trim: bool) -> None:
    texts = text_batches(3)
    lists = [{k: [kind(row) for row in v.tolist()] for k, v in b.items()} for b in texts]
    for batch in lists:
        batch["images"] = []  # of no sample
    found = run(make_llama(), iter(lists), lora(), trim_padding=trim)
    assert_same(found, run(make_llama(), iter(texts), lora()))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("more", [{}, {"labels": 1}])
def test_lists_collated_by_position_are_an_error(more: dict[str, Any], padded: bool) -> None:
    texts = {k: v.tolist() for k, v in text_batches(1, 12, padded=padded)[0].items()}
    rows = [dict(zip(texts, row, strict=True), **more) for row in zip(*texts.values(), strict=True)]
    length = 11 if padded else 24  # the mask shows it, or there are more positions than samples
    short = [{k: v[:length] if k in texts else v for k, v in row.items()} for row in rows]
    with pytest.raises(EvaValueError, match="one position of all samples"):
        run(make_llama(), DataLoader(short, batch_size=12))


def test_lists_that_a_model_takes_stay_lists() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(20, 12)

        def forward(self, images: list[Tensor]) -> Tensor:
            return torch.stack([self.lin(image).mean(0) for image in images])

    batch = {"images": [torch.randn(5, 20), torch.randn(7, 20)]}
    assert run(Listed(), iter([batch]), lora(target_modules=["lin"])).tokens == 7


def test_inputs_and_targets_require_forward_fn() -> None:
    (texts,) = text_batches(1)
    with pytest.raises(EvaTypeError, match=r"mapping among other things.*pass forward_fn"):
        run(make_llama(), iter([(texts, texts["input_ids"])]))


class FailingStream(IterableDataset):
    """Yields four batches, or fails at one of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at

    def __iter__(self) -> Iterator[Tensor]:
        for i, x in enumerate(vectors(4)):
            if i == self.fail_at:
                raise OSError("disk")
            yield x


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_have_ended_after_the_pass(persistent: bool) -> None:
    config = lora(target_modules=["0", "2"], tau=1.0)
    before = set(multiprocessing.active_children())
    loader = DataLoader(
        FailingStream(), batch_size=None, num_workers=1, persistent_workers=persistent
    )
    result = run(make_mlp(), loader, config, max_steps=6)  # ends within the second epoch
    assert result.tokens == 6 * 40
    del loader
    assert set(multiprocessing.active_children()) == before


def test_error_of_a_worker_is_raised() -> None:
    model = make_mlp()
    loader = DataLoader(FailingStream(fail_at=2), batch_size=None, num_workers=1)
    with pytest.raises(OSError, match="disk"):
        run(model, loader, lora(target_modules=["0", "2"], tau=1.0))
    assert hooks_of(model) == 0
    del loader
    gc.collect()  # the traceback
    for worker in multiprocessing.active_children():
        worker.join(timeout=10)  # torch terminates one that failed, and does not wait
    assert not multiprocessing.active_children()


def test_interrupted_passes_end_their_workers() -> None:
    def interrupt(model: nn.Module, batch: Any) -> None:
        raise KeyboardInterrupt

    loader = DataLoader(FailingStream(), batch_size=None, num_workers=1)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(make_mlp(), loader, lora(target_modules=["0"]), forward_fn=interrupt)
    assert not multiprocessing.active_children()
    assert caught.tb is not None  # although the traceback is kept


def test_mapping_of_samples_is_no_loader() -> None:
    samples = dict.fromkeys(range(99), text_batches(1)[0])
    with pytest.raises(EvaTypeError, match=r"a mapping with the keys 0, 1, .*, 7 and 91 more\."):
        run(make_llama(), samples, lora())


def test_other_mappings_are_batches() -> None:
    texts = text_batches(3)
    expected = reference(texts)
    kinds: dict[str, Any] = {
        "UserDict": UserDict,
        "MappingProxyType": types.MappingProxyType,
        "ModelOutput": lambda b: ModelOutputBatch(**b),
    }
    for make in kinds.values():
        assert_same(reference([make(b) for b in texts]), expected)


class ModelOutputBatch(BaseModelOutput):
    """A transformers output with fields of a batch."""

    def __init__(self, **fields: Tensor) -> None:
        super().__init__()
        for key, value in fields.items():
            self[key] = value


def test_string_columns_are_dropped_unless_named() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(20, 4)
            self.captions: list[Any] = []

        def forward(self, x: Tensor, caption: list[str] | None = None) -> Tensor:
            self.captions.append(caption)
            return self.lin(x)

    model = Reader()
    data = [{"x": x, "caption": ["a"] * 40, "path": ["b"] * 40} for x in vectors(3)]
    run(model, iter(data), lora(target_modules=["lin"]))
    assert model.captions == [["a"] * 40] * 3
    assert set(data[0]) == {"x", "caption", "path"}


def test_packed_sequences_are_masked_by_labels() -> None:
    rows = [
        {"input_ids": s["input_ids"][:n]} for s, n in zip(samples(8), range(5, 13), strict=True)
    ]
    collate = DataCollatorWithFlattening(return_tensors="pt")
    batches = [dict(collate(rows[:4])), dict(collate(rows[4:]))]
    assert batches[0]["input_ids"].shape[0] == 1
    result = run(make_llama(), iter(batches), lora(tau=1.0), method="gram")
    # the collator gives the first token of each sample no label
    assert result.tokens == sum(len(r["input_ids"]) - 1 for r in rows)
    model = make_llama()
    model.config.use_cache = False  # with a cache transformers lets packed samples see each other
    inputs = layer_inputs(model, batches, [LAYER], masked=False)[LAYER]
    keep = torch.cat([b["labels"].flatten() != -100 for b in batches])
    assert lost(result.components[LAYER], inputs[keep]) < 1e-6


@pytest.mark.parametrize("kind", ["bool", "additive", "integers"])
def test_pair_masks_keep_their_tokens(kind: str) -> None:
    texts = text_batches(3)
    batches = []
    for batch in texts:
        keep = batch["attention_mask"].bool()
        causal = torch.ones(24, 24, dtype=torch.bool).tril()
        pairs = (causal & keep[:, None, :] & keep[:, :, None])[:, None]
        if kind == "additive":
            pairs = torch.where(pairs, 0.0, torch.finfo(torch.float32).min)
        elif kind == "integers":
            pairs = pairs.long()
        batches.append({"input_ids": batch["input_ids"], "attention_mask": pairs})
    # a stand-in for attention, since transformers takes some kinds of masks only
    model = Attention()
    result = run(model, iter(batches), lora(target_modules=["lin"], tau=1.0), method="gram")
    assert result.tokens == sum(int(b["attention_mask"].sum()) for b in texts)
    with torch.no_grad():
        rows = [model.embed(b["input_ids"])[b["attention_mask"].bool()] for b in texts]
    assert lost(result.components["lin"], torch.cat(rows)) < 1e-6


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed, self.lin = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert attention_mask.dim() == 4
        return self.lin(self.embed(input_ids))


def test_causal_pair_mask_keeps_every_token() -> None:
    ids = text_batches(2, padded=False)[0]["input_ids"]
    pairs = torch.ones(4, 1, 24, 24, dtype=torch.bool).tril()
    result = run(
        Attention(),
        iter([{"input_ids": ids, "attention_mask": pairs}]),
        lora(target_modules=["lin"]),
    )
    assert result.tokens == ids.numel()


def test_mask_that_covers_a_prefix() -> None:
    class Prefixed(Attention):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            assert attention_mask.shape[1] == input_ids.shape[1] + 5
            return self.lin(self.embed(input_ids))

    batches = []
    for batch in text_batches(2):
        prefix = torch.ones(4, 5, dtype=torch.long)
        mask = torch.cat([prefix, batch["attention_mask"]], 1)
        batches.append({"input_ids": batch["input_ids"], "attention_mask": mask})
    result = run(Prefixed(), iter(batches), lora(target_modules=["lin"]), trim_padding=False)
    assert result.tokens == sum(int(b["attention_mask"][:, 5:].sum()) for b in batches)


def test_multi_label_classes_as_many_as_tokens_are_no_mask() -> None:
    batches = text_batches(3)
    for batch in batches:
        batch["labels"] = torch.randint(0, 2, (4, 24))
    model = make_bert()
    model.config.problem_type = "multi_label_classification"
    result = run(model, iter(batches), lora(tau=1.0))
    assert result.tokens == sum(int(b["attention_mask"].sum()) for b in batches)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.uint8])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    texts = text_batches(3)
    expected = run(Masked(), iter(texts), lora(target_modules=["lin"], tau=1.0))
    other = [{**b, "attention_mask": b["attention_mask"].to(dtype)} for b in texts]
    result = run(Masked(), iter(other), lora(target_modules=["lin"], tau=1.0))
    assert result.tokens == expected.tokens
    torch.testing.assert_close(result.components["lin"], expected.components["lin"])


class Masked(Attention):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.lin(self.embed(input_ids))


def test_left_padding_is_masked() -> None:
    right = text_batches(4)
    left = []
    for batch in right:
        shifts = (24 - batch["attention_mask"].sum(1)).tolist()
        left.append(
            {
                key: torch.stack([row.roll(n) for row, n in zip(value, shifts, strict=True)])
                for key, value in batch.items()
            }
        )
    assert all(not bool(b["attention_mask"][:, 0].all()) for b in left)
    model = make_llama()
    result = run(model, iter(left), lora(tau=1.0), method="gram")
    rows = layer_inputs(model, left, [LAYER])[LAYER]
    assert result.tokens == len(rows)
    variances = exact_pca(rows)[0]
    ratio = (variances / variances.sum())[:8]
    torch.testing.assert_close(
        result.explained_variance_ratio[LAYER].double(), ratio, rtol=1e-3, atol=1e-6
    )


def test_loader_stays_usable_by_the_caller() -> None:
    generator = torch.Generator().manual_seed(3)
    data = torch.cat(vectors())
    loader = DataLoader(data, batch_size=40, shuffle=True, generator=generator)
    config = lora(target_modules=["0", "2"])
    eva_kernels.initialize(make_mlp(), loader, config, max_steps=3, **QUIET)
    assert loader.batch_size == 40
    assert len(list(loader)) == 8  # it can be iterated as before


@pytest.mark.parametrize("steps", [2, 3])
def test_accelerate_loader_does_not_affect_gradient_accumulation(steps: int) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    model, data = make_llama(), range(3)
    loader = accelerator.prepare(DataLoader(text_batches(3), None))
    eva_kernels.initialize(model, loader, lora(), max_steps=steps, **QUIET)
    assert not accelerator.gradient_state.in_dataloader
    synced = []
    for _ in data:  # a loader unknown to accelerate
        with accelerator.accumulate(model):
            synced.append(accelerator.sync_gradients)
    assert synced == [False, False, False]


@pytest.mark.parametrize("listed", [True, False])
def test_samples_that_are_batches_of_one_are_refused(listed: bool) -> None:
    rows = torch.arange(3, 11).reshape(2, 1, 4)
    samples = [{"input_ids": ids, "attention_mask": ids > 0} for ids in rows]
    columns = {key: [sample[key] for sample in samples] for key in samples[0]}
    batch = columns if listed else next(iter(DataLoader(samples, batch_size=2)))
    with pytest.raises(EvaValueError, match=r"\(2, 1, 4\).*let the dataset yield its first row"):
        run(make_llama(), [batch], lora(target_modules=["q_proj"]))
    batch = {"input_ids": rows[:, 0], "labels": rows}
    with pytest.raises(EvaValueError, match=r"labels of shape \(2, 1, 4\)"):
        run(make_llama(), [batch], lora(target_modules=["q_proj"]))


def test_samples_in_a_list_are_not_taken_for_one_and_its_targets() -> None:
    ids, config = torch.arange(3, 15)[None], lora(target_modules=["q_proj"])
    for batch in ([ids, ids + 1, ids + 2], [ids, ids[:, :5]]):
        with pytest.raises(EvaTypeError, match="list of samples; give the loader a collator"):
            run(make_llama(), [batch], config)
    several, label = torch.cat([ids, ids + 1]), torch.tensor([[3]])
    for batch in ([ids, ids + 1], [ids, label], [ids, ids + 1, ids > 0], [several, several[:, :5]]):
        result = run(make_llama(), [batch], config, max_steps=1)
        assert result.tokens == batch[0].numel()

"""The same tokens reach the state under autocast, other masks and layouts, loaders and wirings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForMultipleChoice, LlamaForCausalLM

import eva_kernels
from eva_kernels import EvaError, EvaResult
from integration.conftest import (
    QUIET,
    VOCABULARY,
    angle,
    layer_inputs,
    lora,
    lost,
    make_llama,
    run,
    text_batches,
    vectors,
)

EXACT = {"method": "gram"}


def check_equal(a: EvaResult, b: EvaResult, bound: float = 1e-3) -> None:
    assert a.tokens == b.tokens
    assert a.components.keys() == b.components.keys()
    for name, rows in a.components.items():
        assert angle(rows[:3], b.components[name][:3]) < bound, name


class TwoLayers(nn.Module):
    """Two layers and a head, wired by a function."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.a, self.b, self.head = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 3)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, x))


LAYERS_A_B = lora(target_modules=["a", "b"], tau=1.0)


@pytest.mark.parametrize("method", ["gram", "sketch"])
@pytest.mark.parametrize("where", ["caller", "forward_fn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_round_the_components(
    method: str, where: str, dtype: torch.dtype
) -> None:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch)

    model, texts, options = make_llama(dtype), text_batches(4), {"method": method}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "caller"):
        if where == "forward_fn":
            options |= {"forward_fn": forward}
        result = run(model, iter(texts), lora(tau=1.0), **options)
        assert torch.is_autocast_enabled("cpu") == (where == "caller")
    for name, rows in result.components.items():  # not rounded to bfloat16
        assert rows.dtype == torch.float32
        torch.testing.assert_close(
            rows @ rows.mT, torch.eye(len(rows)), atol=1e-5, rtol=0, msg=name
        )


def test_autocast_does_not_change_the_estimator() -> None:
    x = torch.cat(vectors())
    plain, cast = eva_kernels.IncrementalPCA(4), eva_kernels.IncrementalPCA(4)
    plain.partial_fit(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.partial_fit(x)
        assert torch.equal(cast.transform(x), plain.transform(x))
    assert torch.equal(cast.components_, plain.components_)


@pytest.mark.parametrize("how", ["tuple", "list", "loader"])
def test_masks_are_found_among_positional_arguments(how: str) -> None:
    texts = text_batches(4, padded=True)
    pairs: Any = [(b["input_ids"], b["attention_mask"]) for b in texts]
    if how == "list":
        pairs = [list(pair) for pair in pairs]
    elif how == "loader":
        columns = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        pairs = DataLoader(TensorDataset(*columns), batch_size=4)
    expected = run(make_llama(), texts, lora(tau=1.0), max_steps=4, **EXACT)
    check_equal(run(make_llama(), pairs, lora(tau=1.0), max_steps=4, **EXACT), expected)


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_inputs_of_an_exception_fallback_are_not_accumulated(caught: type[BaseException]) -> None:
    """The early exit must not lead a model that catches exceptions to its fallback path."""
    fallbacks = []

    def body(net: Any, x: Tensor) -> Tensor:
        y = torch.tanh(net.a(x))
        try:
            return net.b(y)
        except caught:
            fallbacks.append(1)
            return net.b(torch.full_like(y, 1e3))

    model, data = TwoLayers(body), vectors()
    result = run(model, iter(data), LAYERS_A_B, **EXACT)
    assert bool(fallbacks) == (caught is BaseException)
    read = layer_inputs(model, data, ["b"])["b"]
    assert lost(result.components["b"][:4], read) < 1e-7


@pytest.mark.parametrize("first", [30, 90])
def test_layers_called_once_per_part_of_long_inputs(first: int) -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        return torch.cat([net.b(torch.tanh(net.a(part))) for part in x.split(30)])

    model, data = TwoLayers(body), [vectors(1, first)[0], *vectors(5, 90, seed=3)]
    result = run(model, iter(data), LAYERS_A_B, **EXACT)
    read = layer_inputs(model, data, ["a", "b"])
    for name, inputs in read.items():
        assert lost(result.components[name][:4], inputs) < 1e-7


class TiledImages(TwoLayers):
    """Runs images tile by tile."""

    def forward(self, x: Any, images: Any = None) -> Tensor:
        x = x if images is None else images
        tiles = x if isinstance(x, list) else x.split(4, 2)
        rows = [tile.flatten(2).mT.flatten(0, 1) for tile in tiles]
        return torch.cat([self.b(torch.tanh(self.a(part))) for part in rows])


@pytest.mark.parametrize("kind", ["image", "list", "beside"])
def test_layers_called_once_per_tile_of_images(kind: str) -> None:
    data: list[Any] = []
    for seed, tiles in enumerate((1, 3, 3, 2)):
        rows = vectors(1, 2 * tiles * 4 * 5, seed=seed)[0]
        image = rows.reshape(2, tiles * 4, 5, 20).movedim(3, 1)
        beside = {"x": torch.arange(2), "images": image}
        parts = {"x": list(image.split(4, 2))}
        data.append({"image": image, "list": parts, "beside": beside}[kind])
    model = TiledImages(lambda net, x: x)
    result = run(model, iter(data), LAYERS_A_B, **EXACT)
    for name, inputs in layer_inputs(model, data, ["a", "b"]).items():
        assert lost(result.components[name][:4], inputs) < 1e-7


def test_early_exit_only_for_batches_no_larger_than_before() -> None:
    batch_sizes = []

    class Counted(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.b(torch.tanh(self.a(x)))
            batch_sizes.append(len(x))
            return self.head(y)

    data = [vectors(1, rows)[0] for rows in (30, 20, 50, 40, 50, 60, 10)]
    run(Counted(lambda net, x: x), iter(data), LAYERS_A_B)
    assert batch_sizes == [30, 50, 60]


class TorchTransformer(nn.Module):
    """torch's Transformer, whose fast path in eval mode uses nested tensors and calls no layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        hidden = self.encoder(hidden, src_key_padding_mask=~attention_mask.bool())
        return self.head(hidden)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_torch_transformer_with_padding_skips_its_fast_path() -> None:
    texts, config = text_batches(4), lora(target_modules=["linear1", "linear2"], tau=1.0)
    result = run(TorchTransformer().eval(), iter(texts), config, **EXACT)
    assert torch.backends.mha.get_fastpath_enabled()
    assert set(result.ranks) == {f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert result.tokens == sum(int(b["attention_mask"].sum()) for b in texts)


@pytest.mark.parametrize("part", ["whole", "block"])
def test_compiled_forward_calls_the_hooks(part: str) -> None:
    texts = text_batches(4)
    plain = run(make_llama(), iter(texts), lora(tau=1.0), **EXACT)
    model = make_llama()
    owner: Any = model if part == "whole" else model.model.layers[0]
    owner.forward = torch.compile(owner.forward, backend="eager")
    with torch.no_grad():
        model(**texts[0])  # compiled before the hooks are there
    check_equal(run(model, iter(texts), lora(tau=1.0), **EXACT), plain)


def test_mask_of_multiple_choice_inputs() -> None:
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model, texts = BertForMultipleChoice(config).eval(), text_batches(4, samples=6)
    choices = [{k: v.view(2, 3, -1) for k, v in b.items()} for b in texts]
    options = {"target_modules": ["query", "intermediate.dense"], "tau": 1.0}
    result = run(model, iter(choices), lora(**options), **EXACT)
    assert result.tokens == sum(int(b["attention_mask"].sum()) for b in texts)


@pytest.mark.parametrize("kind", ["additive", "bool", "pairs of three dimensions"])
def test_masks_of_other_shapes_and_types(kind: str) -> None:
    texts = text_batches(4)
    plain = run(make_llama(), iter(texts), lora(tau=1.0), **EXACT)

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(input_ids=batch["input_ids"], attention_mask=batch["own_mask"])

    changed = []
    for batch in texts:
        mask = batch["attention_mask"].bool()[:, None, None]
        if kind == "additive":
            mask = (~mask).float() * torch.finfo(torch.float32).min
        elif kind != "bool":
            mask = mask[:, 0].expand(-1, mask.shape[-1], -1)
        two = {"input_ids": batch["input_ids"], "own_mask": batch["attention_mask"]}
        changed.append({**two, "attention_mask": mask})
    check_equal(run(make_llama(), iter(changed), lora(tau=1.0), forward_fn=forward, **EXACT), plain)


def test_sequence_first_layout_is_found_despite_square_batches() -> None:
    """Batches of another shape show the layout; a square one alone is ambiguous."""

    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.embed, self.a = nn.Embedding(VOCABULARY, 20), nn.Linear(20, 20)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.a(self.embed(input_ids).transpose(0, 1).contiguous())

    batches = [*text_batches(2, samples=8, length=24), *text_batches(4, samples=12, length=12)]
    model, config = SequenceFirst(), lora(target_modules=["a"], tau=1.0)
    result = run(model, iter(batches), config, trim_padding=False, **EXACT)
    rows = torch.cat([model.embed(b["input_ids"])[b["attention_mask"].bool()] for b in batches])
    assert lost(result.components["a"][:4], rows.detach()) < 1e-7


def test_default_device_does_not_affect_the_state() -> None:
    """The package's own tensors are on the device of the model."""
    model, texts = make_llama(), text_batches(4, labels=True)
    options: dict[str, Any] = {"max_steps": 4, "tokens_per_step": 30}
    expected = eva_kernels.initialize(copy.deepcopy(model), texts, lora(), **QUIET, **options)
    torch.set_default_device("meta")
    try:
        result = run(model, texts, lora(), method="sketch", seed=123, **options)
        again = run(model, texts, lora(), **options)
    finally:
        torch.set_default_device(None)
    assert torch.equal(
        *(r.components["model.layers.0.mlp.up_proj"] for r in (again, expected.eva_result))
    )
    assert all(not rows.is_meta for rows in result.components.values())
    run(model, texts, lora(), method="sketch", seed=123, **options)


def test_batches_that_are_iterators_are_not_consumed() -> None:
    parts = []

    def forward(model: nn.Module, batch: Iterator[Tensor]) -> None:
        for part in batch:
            parts.append(part)
            model(part)

    data = vectors(8)
    pairs = (iter(data[i : i + 2]) for i in range(0, 8, 2))
    run(TwoLayers(lambda net, x: net.b(net.a(x))), pairs, LAYERS_A_B, forward_fn=forward)
    assert len(parts) == 8


def test_user_function_may_modify_its_batch() -> None:
    def emptied(batch: dict[str, Tensor], config: Any) -> Tensor:
        return batch.pop("input_ids").nonzero()

    data = [{"input_ids": batch["input_ids"]} for batch in text_batches(2, padded=False)]
    options = {"max_steps": 2, "prepare_model_inputs_fn": emptied}
    assert run(make_llama(), data, lora(), **options).tokens == 2 * 4 * 24
    assert all(list(batch) == ["input_ids"] for batch in data)


def test_layer_functions_work_with_keyword_calls() -> None:
    model = TwoLayers(lambda net, x: net.b(input=torch.tanh(net.a(input=x))))
    data = vectors()
    plain = run(model, iter(data), LAYERS_A_B, **EXACT)
    for options in (
        {"prepare_layer_inputs_fn": None},
        {"prepare_layer_inputs_fn": lambda given, model_input, name: given[0]},
    ):
        check_equal(run(model, iter(data), LAYERS_A_B, **EXACT, **options), plain)


class OwnIteratorLoader:
    """A loader that is its own iterator, and starts again on ``iter``."""

    def __init__(self, data: list[Tensor]) -> None:
        self.data, self.next = data, 0

    def __iter__(self) -> OwnIteratorLoader:
        self.next = 0
        return self

    def __next__(self) -> Tensor:
        if self.next == len(self.data):
            raise StopIteration
        self.next += 1
        return self.data[self.next - 1]


def test_loader_that_is_its_own_iterator_has_epochs() -> None:
    model = TwoLayers(lambda net, x: net.b(net.a(x)))
    assert run(model, OwnIteratorLoader(vectors(3)), LAYERS_A_B, max_steps=10).forwards == 10
    assert run(model, iter(vectors(3)), LAYERS_A_B, max_steps=10).forwards == 3


def test_numpy_arrays_and_numbers_are_accepted() -> None:
    texts = text_batches(4)
    arrays = [{k: v.numpy() for k, v in b.items()} for b in texts]
    options = {"seed": np.int64(3), "max_steps": np.int32(4)}
    result = run(make_llama(), arrays, lora(tau=1.0), **EXACT, **options)
    check_equal(result, run(make_llama(), texts, lora(tau=1.0), seed=3, max_steps=4, **EXACT))


def test_list_of_samples_is_rejected_for_lack_of_a_collator() -> None:
    samples = [{k: v[0] for k, v in b.items()} for b in text_batches(4)]
    with pytest.raises(EvaError, match="list of samples; give the loader a collator"):
        run(make_llama(), [samples])


def test_float_columns_of_text_do_not_disable_its_mask() -> None:
    class Weighted(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, weights: Tensor) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    texts = text_batches(4)
    plain = run(make_llama(), iter(texts), lora(tau=1.0), trim_padding=False, **EXACT)
    model = make_llama()
    model.__class__ = Weighted
    weighted = [{**b, "weights": torch.rand(b["input_ids"].shape)} for b in texts]
    check_equal(run(model, iter(weighted), lora(tau=1.0), trim_padding=False, **EXACT), plain)


def test_sample_with_more_tokens_than_the_mask_warns() -> None:
    class Prefixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a = nn.Embedding(VOCABULARY, 20), nn.Linear(20, 20)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.embed(input_ids)
            return self.a(torch.cat([x[:, :2], x], 1))

    config = lora(target_modules=["a"], tau=1.0)
    texts = text_batches(4, samples=1)
    with pytest.warns(eva_kernels.EvaWarning, match="layer a: no token mask fits"):
        run(Prefixed(), iter(texts), config, trim_padding=False)


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("decoder.layers.0.cross_attention.k_proj", True),
        ("decoder.layers.0.cross_attn.key_proj", True),
        ("decoder.layer.0.encoder_decoder_attention.attention.key", True),
        ("decoder.block.0.layer.1.EncDecAttention.v", True),
        ("decoder.layers.0.cross_attention.q_proj", False),
        ("decoder.layers.0.self_attn.k_proj", False),
    ],
)
def test_cross_attention_projections_get_the_mask_they_read(name: str, encoder: bool) -> None:
    from eva_peft.inputs.token_mask import TokenMask

    main = torch.tensor([[True, True, False]])
    decoder = torch.tensor([[True, False, False]])
    rule = TokenMask(main, decoder, encoder_decoder=True)
    rows = rule.rows(torch.Size((1, 3, 8)), torch.device("cpu"), name)
    assert rows is not None
    assert rows.tolist() == ([0, 1] if encoder else [0])

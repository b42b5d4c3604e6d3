"""Which parts of a model are hooked for masks, and which masks they receive apply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eva_kernels import EvaValueError, check_padding
from eva_peft.inputs.part_masks import parts_taking_masks
from integration.conftest import (
    VOCABULARY,
    layer_inputs,
    lora,
    lost,
    make_bert,
    make_llama,
    run,
    wrapped,
)
from integration.inputs.padding_blocks import EXACT, KEPT, LENGTHS, KeepBlock, batches


def test_adapted_layers_are_hooked_where_their_base_takes_masks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.first = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32)
            self.looks, self.base_layer = nn.MultiheadAttention(32, 2), 3
            self.bert = make_bert()

        def forward(self, ids: Tensor, **more: Any) -> Tensor:
            x = self.first(self.words(ids))
            return self.looks(x, x, x, **more)[0]

    config = lora(target_modules=["first", "looks", "query"], init_lora_weights=True)
    model = wrapped(Model(), config)
    found = [part for part in parts_taking_masks(model) if isinstance(part, LoraLayer)]
    base = model.base_model.model
    assert found == [base.looks]
    assert base in parts_taking_masks(model)


class MaskedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor, lengths: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(x)


def nested(parts: list[Tensor], layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor(parts, layout=layout)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
@pytest.mark.parametrize("kind", ["nested", "jagged", "sparse"])
def test_nested_and_sparse_masks_are_ignored(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.reads = nn.Embedding(VOCABULARY, 16), MaskedLinear()
            self.last = nn.Linear(16, 4)

        def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
            if kind == "sparse":
                mask = ids.ne(0).float().to_sparse()
                return self.last(self.reads(self.words(ids), lengths, mask))
            layout = torch.jagged if kind == "jagged" else torch.strided
            keep = nested([row[row != 0].ne(0) for row in ids], layout)
            x = nested([self.words(row[row != 0]) for row in ids], layout)
            return self.last(torch.nested.to_padded_tensor(self.reads(x, lengths, keep), 0.0))

    def tokens_of(args: Any, *_: Any) -> Tensor:
        x = args[0] if isinstance(args, tuple) else args
        return torch.cat(list(x.unbind())) if x.is_nested else x[KEPT]

    data = [{**batch, "lengths": LENGTHS} for batch in batches()]
    config = lora(target_modules=["inner", "last"])
    selected = {"reads.inner": tokens_of}
    result = run(Model().eval(), data, config, prepare_layer_inputs_fn=selected, **EXACT)
    assert result.tokens == 4 * int(KEPT.sum())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_parts_take_no_hooks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.reads = nn.Embedding(VOCABULARY, 16), torch.jit.script(MaskedLinear())
            self.last = nn.Linear(16, 4)

        def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
            return self.last(self.reads(self.words(ids), lengths, KEPT))

    result = run(Model().eval(), batches(lengths=True), lora(target_modules=["last"]), **EXACT)
    assert result.tokens == 4 * int(KEPT.sum())


CONTEXT_MASK = torch.arange(5) < torch.tensor([2, 3, 5])[:, None]
CONTEXT_TOKENS = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


class CrossLayer(nn.Module):
    """Attends to a context, with masks of the context, of its own tokens, of both or neither."""

    def __init__(self) -> None:
        super().__init__()
        self.asks, self.keys = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, context: Tensor, **masks: Tensor) -> Tensor:
        return self.asks(x) + self.keys(context).mean(1, keepdim=True)


class Outer(KeepBlock):
    """Passes its own mask to no inner part."""

    def __init__(self, masks: dict[str, Tensor]) -> None:
        super().__init__()
        self.looks, self.masks = CrossLayer(), masks

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.looks(super().forward(x, mask), CONTEXT_TOKENS, **self.masks)


class ContextModel(nn.Module):
    def __init__(self, masks: dict[str, Tensor], within: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 4)
        self.part = Outer(masks) if within else KeepBlock()
        self.looks, self.masks = CrossLayer(), masks

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.part(self.words(ids), ids.ne(0))
        if not isinstance(self.part, Outer):
            x = self.looks(x, CONTEXT_TOKENS, **self.masks)
        return self.last(x)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("mask_in_batch", [False, True], ids=["", "batch"])
@pytest.mark.parametrize("within", [False, True], ids=["behind", "within"])
@pytest.mark.parametrize("kind", ["nothing", "mask", "lengths", "padding", "both"])
def test_context_masks_leave_the_mask_of_own_tokens_in_force(
    kind: str, within: bool, mask_in_batch: bool
) -> None:
    masks = {
        "nothing": {},
        "mask": {"context_mask": CONTEXT_MASK},
        "lengths": {"context_lengths": CONTEXT_MASK.sum(1)},
        "padding": {"memory_key_padding_mask": ~CONTEXT_MASK},
        "both": {"mask": KEPT, "context_mask": CONTEXT_MASK},
    }[kind]
    data = batches()
    data = [{**batch, "attention_mask": KEPT.long()} for batch in data] if mask_in_batch else data
    looks = "part.looks" if within else "looks"
    kept = {"part.behind": KEPT, f"{looks}.asks": KEPT, "last": KEPT}
    kept |= {f"{looks}.keys": CONTEXT_MASK} if kind != "nothing" else {}
    model = ContextModel(masks, within).eval()
    result = run(model, data, lora(tau=1.0, target_modules=list(kept)), **EXACT)
    for name, x in layer_inputs(model, data, list(kept), masked=False).items():
        assert lost(result.components[name], x[kept[name].flatten().repeat(4)]) < 1e-6, name


class Blocks(nn.Module):
    """Passes on tuples of tokens and positions, as ESPnet's Conformer and Branchformer."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.behind = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(
            self, x_input: tuple[Tensor, Tensor], mask: Tensor
        ) -> tuple[tuple[Tensor, Tensor], Tensor]:
            x, positions = x_input
            x = self.before(x) + positions
            return (self.behind(x.tanh()), positions), mask

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList([self.Block() for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x, mask = (self.words(ids), torch.ones(1, 7, 16)), ids.ne(0)[:, None]
        for block in self.blocks:
            x, mask = block(x, mask)
        return self.last(x[0])


def test_tokens_in_a_tuple_with_positions_are_masked() -> None:
    model, data = Blocks().eval(), batches()
    names = [f"blocks.{i}.{part}" for i in range(2) for part in ("before", "behind")] + ["last"]
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names).items():
        assert lost(result.components[name], x[KEPT.flatten().repeat(4)]) < 1e-6, name
    assert result.tokens == 4 * int(KEPT.sum())


@pytest.mark.parametrize("use_forward_fn", [False, True], ids=["default", "forward_fn"])
@pytest.mark.parametrize("names", [(0, 1), (None, ("a", "to", "b"))], ids=["numbers", "tuples"])
def test_mappings_with_non_string_keys(names: tuple[Any, Any], use_forward_fn: bool) -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads = nn.Linear(16, 4)

        def forward(self, levels: dict[Any, Tensor], mask: Tensor | None = None) -> Tensor:
            return self.reads(torch.cat([levels[name] for name in names], 1))

    class Model(Levels):
        def __init__(self) -> None:
            super().__init__()
            self.part = Levels()

        def forward(self, levels: dict[Any, Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(levels) + self.part(levels, None)

    data = [dict(zip(names, torch.randn(2, 3, 7, 16), strict=True)) for _ in range(4)]
    options = {**EXACT, "forward_fn": lambda m, b: m(b)} if use_forward_fn else EXACT
    result = run(Model(), data, lora(target_modules=["reads"]), **options)
    assert result.tokens == 4 * 3 * 14


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 16)])
def test_context_arguments_without_tokens_are_ignored(shape: tuple[int, ...]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads = nn.Linear(16, 16)

        def forward(self, x: Tensor, mask: Tensor, context_scale: Tensor) -> Tensor:
            return self.reads(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.part = nn.Embedding(VOCABULARY, 16), Scaled()

        def forward(self, ids: Tensor) -> Tensor:
            return self.part(self.words(ids), ids.ne(0), torch.ones(shape))

    result = run(Model().eval(), batches(), lora(target_modules=["reads"]), **EXACT)
    assert result.tokens == 4 * int(KEPT.sum())


def test_image_mask_applies_beside_a_scalar_or_one_per_image() -> None:
    class ImageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads = nn.Linear(16, 4)

        def forward(
            self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
        ) -> Tensor:
            return self.reads(hidden_states)

    for condition in (torch.tensor(1.0), torch.ones(3)):
        batch = {"hidden_states": torch.randn(3, 7, 16), "encoder_hidden_states": condition}
        data = [{**batch, "attention_mask": KEPT}] * 4
        result = run(ImageModel(), data, lora(target_modules=["reads"]), **EXACT)
        assert result.tokens == 4 * int(KEPT.sum())


def test_mask_changed_in_place_applies_as_each_part_receives_it() -> None:
    """As in models that prune tokens layer by layer."""

    class Prunes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(VOCABULARY, 16)
            self.first, self.second = KeepBlock(), KeepBlock()

        def forward(self, ids: Tensor) -> Tensor:
            mask = ids.ne(0)
            x = self.first(self.words(ids), mask)
            mask[:, 3:] = False
            return self.second(x, mask)

    model, kept = Prunes().eval(), {"first.behind": KEPT, "second.behind": KEPT.clone()}
    kept["second.behind"][:, 3:] = False
    result = run(model, batches(), lora(tau=1.0, target_modules=list(kept)), **EXACT)
    for name, x in layer_inputs(model, batches(), list(kept)).items():
        assert lost(result.components[name], x[kept[name].flatten().repeat(4)]) < 1e-6, name


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.filterwarnings("ignore:.* seem to be padding:eva_kernels.EvaWarning")
def test_float_masks_apply_where_they_are_additive(added: bool) -> None:
    """As in PatchTST-FM; other float arguments may mean anything."""

    class Layer(nn.Linear):
        def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = nn.Embedding(VOCABULARY, 16), Layer(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = ids.eq(0)
            hidden = (hidden[:, None] | hidden[..., None])[:, None]
            mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
            return self.layer(self.words(ids), mask if added else (~hidden).float())

    result = run(Model(), batches(), lora(tau=1.0, target_modules=["layer"]), **EXACT)
    assert result.tokens == 4 * int(KEPT.sum() if added else KEPT.numel())


@pytest.mark.parametrize("additive", [False, True])
def test_mask_of_values_in_as_many_patches_hides_no_token(additive: bool) -> None:
    class Model(nn.Module):  # as Moirai, whose scaler does not see what is to be predicted
        def __init__(self) -> None:
            super().__init__()
            self.reads = nn.Linear(16, 4)

        def forward(self, target: Tensor, observed_mask: Tensor) -> Tensor:
            return self.reads(target)

    observed = torch.ones(3, 16, 16, dtype=torch.bool)
    observed[:, 12:] = False
    hidden = torch.zeros(3, 16, 16).masked_fill(~observed, -torch.inf)
    mask = hidden if additive else observed
    data = [{"target": torch.randn(3, 16, 16), "observed_mask": mask} for _ in range(4)]
    result = run(Model().eval(), data, lora(tau=1.0, target_modules=["reads"]), **EXACT)
    assert result.tokens == 4 * 48


def test_own_mask_beside_the_context_mask_of_the_batch_applies() -> None:
    class ContextBlock(KeepBlock):
        def forward(self, x: Tensor, mask: Tensor, **context: Tensor) -> Tensor:
            return super().forward(x, mask)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.block = nn.Embedding(VOCABULARY, 16), ContextBlock()

        def forward(self, ids: Tensor, **context: Tensor) -> Tensor:
            return self.block(self.words(ids), ids != 0, **context)

    context = {"encoder_hidden_states": torch.ones(3, 5, 16)}
    context["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0]] * 3)
    data = [{**batch, **context} for batch in batches()]
    config = lora(tau=1.0, target_modules=["before"])
    assert run(Model().eval(), data, config, **EXACT).tokens == 4 * int(KEPT.sum())


class HiddenPairs(nn.Module):
    """Takes or makes a causal mask that is true of what is hidden, as in Megatron."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.block = nn.Embedding(VOCABULARY, 16), HiddenPairsBlock()

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = hidden_pairs(ids, rows=False) if attention_mask is None else attention_mask
        return self.block(self.words(ids), hidden)


class HiddenPairsBlock(KeepBlock):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.run(x, None, attention_mask.bool()[:, 0].all(1))


def hidden_pairs(ids: Tensor, rows: bool) -> Tensor:
    """Return what each token does not see; of padding that is everything if ``rows``."""
    kept, causal = ids != 0, torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    seen = causal & kept[:, None, None]
    return ~(seen & kept[:, None, :, None]) if rows else ~seen


@pytest.mark.parametrize("given", ["made", "keys", "rows", "integers"])
def test_pairwise_mask_that_is_true_of_what_is_hidden(given: str) -> None:
    # no padding in some samples, or some in each
    data = [{"ids": nn.functional.pad(b["ids"], (0, i % 2))} for i, b in enumerate(batches())]
    if given != "made":
        masks = [hidden_pairs(batch["ids"], given != "keys") for batch in data]
        masks = [mask.long() if given == "integers" else mask for mask in masks]
        data = [{**batch, "attention_mask": m} for batch, m in zip(data, masks, strict=True)]
    model, names = HiddenPairs().eval(), ["block.before", "block.behind"]
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    assert result.tokens == 4 * int(KEPT.sum())
    rows = torch.cat([batch["ids"].flatten() != 0 for batch in data])
    for name, x in layer_inputs(model, data, names).items():
        assert lost(result.components[name], x[rows]) < 1e-5


def test_models_of_transformers_refuse_a_mask_that_they_would_read_the_other_way_round() -> None:
    ids, config = batches()[0]["ids"], lora(target_modules=["q_proj"])
    additive = torch.where(ids != 0, 0.0, -1e4)
    for mask, how in ((hidden_pairs(ids, rows=False), "true"), (additive, "negative")):
        message = rf"is {how} where it hides .* the other way round; let the loader yield mask == 0"
        with pytest.raises(EvaValueError, match=message):
            run(make_llama(), [{"input_ids": ids, "attention_mask": mask}], config)


class HidingModel(nn.Module):
    """Passes its mask on as torch's transformers take it: true at padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.before, self.last = (
            nn.Embedding(VOCABULARY, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.before(self.words(ids))
        return self.last(self.encoder(x, src_key_padding_mask=mask))


def test_mask_of_a_users_model_may_be_true_at_padding() -> None:
    model, names = HidingModel().eval(), ["before", "linear1", "last"]
    data = [{**batch, "mask": ~KEPT} for batch in batches()]
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    assert result.tokens == 4 * int(KEPT.sum())
    for layer in check_padding(model, data[0], lora(target_modules=names)).layers.values():
        assert (layer.counted, layer.padding_counted) == (int(KEPT.sum()), 0)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("y", torch.where(KEPT, 1, -1)),
        ("y", torch.arange(-110, KEPT.numel() - 110).reshape(KEPT.shape)),
        ("labels", KEPT.long()),
    ],
    ids=["another number for no label", "negative numbers", "labels of every token"],
)
def test_targets_that_hide_no_token_leave_the_masks_of_parts_in_force(
    name: str, targets: Tensor
) -> None:
    class Model(HidingModel):
        def forward(self, ids: Tensor, y: Any = None, labels: Any = None) -> Tensor:
            return super().forward(ids, ids == 0)

    data = [{**batch, name: targets} for batch in batches()]
    config = lora(tau=1.0, target_modules=["linear1", "last"])
    assert run(Model().eval(), data, config, **EXACT).tokens == 4 * int(KEPT.sum())


def test_labels_under_another_name_do_not_restrict_a_mask_in_the_batch() -> None:
    """Masked words under any name but labels, with the padding as the model is told."""
    config = lora(tau=1.0, target_modules=["query"])
    targets = torch.where(torch.arange(KEPT.shape[1]) == 1, 3, -100).expand(KEPT.shape)
    data = [{**batch, "mask": KEPT.long(), "words": targets} for batch in batches()]
    options = {"forward_fn": lambda model, b: model(b["ids"], attention_mask=b["mask"])}
    assert run(make_bert(), data, config, **options, **EXACT).tokens == 4 * int(KEPT.sum())

"""Only tokens that the masks keep count, whatever the other positions contain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

import eva_kernels
from eva_peft.inputs.batch_mask import mask_of_batch
from eva_peft.inputs.token_mask import TokenMask
from eva_peft.model.architecture import Architecture
from integration.conftest import (
    VOCABULARY,
    angle,
    layer_inputs,
    lora,
    lost,
    make_bert,
    make_llama,
    run,
    text_batches,
)

LAYER = "model.layers.1.self_attn.q_proj"


def same_bits(one: Any, other: Any) -> bool:
    return one.ranks == other.ranks and all(
        torch.equal(rows, other.components[n])
        and torch.equal(one.singular_values[n], other.singular_values[n])
        for n, rows in one.components.items()
    )


def check_close(one: Any, other: Any, atol: float = 2e-4) -> None:
    assert one.tokens == other.tokens
    for name, rows in one.components.items():
        values = one.singular_values[name]
        # directions are determined where the spectrum has gaps; their span always is
        torch.testing.assert_close(values, other.singular_values[name], rtol=1e-4, atol=1e-4)
        gap = (values[:-1] - values[1:]) / values[:-1]
        rank = int(gap.argmax()) + 1
        assert angle(rows[:rank], other.components[name][:rank]) < atol, name


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("method", ["gram", "sketch"])
def test_padding_values_do_not_matter(trim: bool, method: str) -> None:
    batches = text_batches(4)
    other = copy.deepcopy(batches)
    for batch in other:
        padding = batch["attention_mask"] == 0
        batch["input_ids"][padding] = torch.randint(1, VOCABULARY, (int(padding.sum()),))
    options = {"method": method, "trim_padding": trim}
    first = run(make_llama(), iter(batches), lora(tau=1.0), **options)
    second = run(make_llama(), iter(other), lora(tau=1.0), **options)
    assert any(
        not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, other, strict=True)
    )
    assert same_bits(first, second)
    assert first.tokens == sum(int(b["attention_mask"].sum()) for b in batches)


@pytest.mark.parametrize("make", [make_llama, make_bert])
def test_trimming_changes_nothing_but_the_width(make: Any) -> None:
    batches = text_batches(5)
    results, widths = [], []
    for trim in (True, False):
        model, dims = make(), []
        embedding = model.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda _, args, dims=dims: dims.append(args[0].shape))
        config = lora(tau=1.0)
        results.append(run(model, iter(batches), config, method="gram", trim_padding=trim))
        widths.append(dims)
    check_close(*results)
    assert all(shape[1] == 24 for shape in widths[1])
    assert all(shape[1] < 24 for shape in widths[0])
    padded = [sum(s[0] * s[1] for s in shapes) for shapes in widths]
    kept = sum(int(b["attention_mask"].sum()) for b in batches)
    assert kept <= padded[0] < padded[1]


class FixedLengthHead(nn.Module):
    """A user's layers around a model, made for one length or pooling over all positions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, make_bert()
        self.positions = nn.Parameter(torch.randn(1, 24, 32))
        self.head = nn.Linear(24 * 32 if kind == "flattened" else 32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.inner(input_ids, attention_mask).last_hidden_state
        x = x + self.positions if self.kind == "positions" else x
        return self.head(x.flatten(1) if self.kind == "flattened" else x.mean(1))


def padded_to_24(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: functional.pad(value, (0, 24 - value.shape[1])) for key, value in batch.items()}


@pytest.mark.parametrize("kind", ["flattened", "positions", "pooled"])
def test_no_trimming_in_front_of_a_users_layers(kind: str) -> None:
    model = FixedLengthHead(kind).eval()
    texts = [padded_to_24(batch) for batch in text_batches(4, length=20)]
    config = lora(tau=1.0, target_modules=["inner.encoder.layer.0.intermediate.dense", "head"])
    result = run(model, iter(texts), config, method="gram", max_steps=4)
    for name, x in layer_inputs(model, texts, list(result.components)).items():
        assert lost(result.components[name], x) < 1e-6, name


def test_no_splitting_where_samples_are_parts_of_a_text() -> None:
    """One model reads sentences as samples, another one the sequence of their vectors."""

    class SentencesThenText(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sentence, self.text = make_bert(), make_bert()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            x = self.sentence(input_ids, attention_mask).last_hidden_state.mean(1)
            return self.text(inputs_embeds=x.view(-1, 4, 32))

    mask = (torch.arange(60) < torch.tensor([50] + [4] * 31)[:, None]).long()
    batch = {"input_ids": mask * torch.arange(1, 61), "attention_mask": mask}
    model, name = SentencesThenText().eval(), "text.encoder.layer.1.output.dense"
    result = run(model, [batch], lora(tau=1.0, target_modules=[name]), method="gram")
    x = layer_inputs(model, [batch], [name])[name]
    assert lost(result.components[name], x) < 1e-6


def test_splitting_by_length_changes_nothing_else() -> None:
    """Samples of very different lengths go through the model in groups; nothing else changes."""
    ids = torch.randint(1, VOCABULARY, (8, 60))
    lengths = torch.tensor([3, 60, 5, 4, 59, 6, 3, 58])
    mask = (torch.arange(60) < lengths[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(ids > 3, -100)}
    inputs: list[Any] = []
    results = []
    for trim in (True, False):
        model = make_llama()
        model.model.embed_tokens.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        options = {"method": "gram", "trim_padding": trim}
        results.append(run(model, iter([batch] * 2), lora(tau=1.0), **options))
    assert [x.shape[0] for x in inputs[:-2]] != [8] * (len(inputs) - 2)
    assert results[0].forwards == results[1].forwards == 2
    assert results[0].tokens == 2 * int((mask.bool() & (ids > 3)).sum())
    check_close(*results)


def test_left_padding_is_not_trimmed() -> None:
    batches = text_batches(3)
    left = [{k: v.flip(1) for k, v in b.items()} for b in batches]
    model = make_llama()
    widths: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, a: widths.append(a[0].shape[1]))
    result = run(model, iter(left), lora(tau=1.0), method="gram")
    assert widths == [24] * 3
    names = [LAYER, "model.layers.0.mlp.down_proj"]
    inputs = layer_inputs(model, left, names)
    for name in names:
        assert lost(result.components[name], inputs[name]) < 1e-6


def test_list_of_samples_beside_tensors_is_not_regrouped() -> None:
    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lin = nn.Embedding(VOCABULARY, 20), nn.Linear(20, 20)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, extra: list[int]) -> Tensor:
            assert len(extra) == len(input_ids)
            assert [int(row[0]) for row in input_ids] == extra
            return self.lin(self.embed(input_ids))

    ids = torch.randint(1, VOCABULARY, (6, 90))
    mask = (torch.arange(90) < torch.tensor([2, 90, 2, 90, 2, 2])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "extra": ids[:, 0].tolist()}
    assert sum(run(Paired(), iter([batch]), lora(target_modules=["lin"])).ranks.values()) == 4


def test_labels_mask_tokens_but_never_reach_the_model() -> None:
    batches = text_batches(4, labels=True)
    for batch in batches:
        batch["labels"][:, :3] = -100  # a prompt
    model, arguments = make_llama(), []
    forward = model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        arguments.append(set(kwargs))
        return forward(*args, **kwargs)

    model.forward = spy
    result = run(model, iter(batches), lora(tau=1.0), method="gram")
    assert arguments
    assert all("labels" not in names for names in arguments)
    kept = [
        {**b, "attention_mask": b["attention_mask"], "keep": b["labels"] != -100} for b in batches
    ]
    assert result.tokens == sum(int(b["keep"].sum()) for b in kept)
    rows = []
    plain = make_llama()
    for batch in kept:
        pair = {k: batch[k] for k in ("input_ids", "attention_mask")}
        x = layer_inputs(plain, [pair], [LAYER], masked=False)[LAYER]
        rows.append(x[batch["keep"].flatten()])
    assert lost(result.components[LAYER], torch.cat(rows)) < 1e-6


def test_label_mask_options() -> None:
    batches = text_batches(3, labels=True)
    for batch in batches:
        batch["labels"][:, :3] = -100
    attended = sum(int(b["attention_mask"].sum()) for b in batches)
    off = run(make_llama(), iter(batches), lora(tau=1.0, use_label_mask=False))
    assert off.tokens == attended
    on = run(make_llama(), iter(batches), lora(tau=1.0))
    assert on.tokens == attended - 3 * 3 * 4
    value = int(batches[0]["labels"][0, 4])
    other = run(make_llama(), iter(batches), lora(tau=1.0, label_mask_value=value))
    hits = sum(int(((b["labels"] == value) & (b["attention_mask"] == 1)).sum()) for b in batches)
    assert other.tokens == attended - hits


@pytest.mark.parametrize("labels", ["classes", "length equals batch", "multi-label", "scores"])
def test_labels_of_samples_are_no_token_mask(labels: str) -> None:
    samples, length = (24, 24) if labels == "length equals batch" else (4, 24)
    batches = text_batches(3, samples=samples, length=length)
    for batch in batches:
        batch["labels"] = {
            "classes": torch.tensor([0, 1, -100, 1]),
            "length equals batch": torch.tensor([-100, 1] * 12),
            "multi-label": torch.randint(0, 2, (4, 5)),
            "scores": torch.rand(4, 24).where(torch.arange(24) > 0, -100),
        }[labels]
    model = make_bert()
    result = run(model, iter(batches), lora(tau=1.0), method="gram")
    assert result.tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    plain = [{k: v for k, v in b.items() if k != "labels"} for b in batches]
    name = "encoder.layer.1.output.dense"
    assert lost(result.components[name], layer_inputs(model, plain, [name])[name]) < 1e-6


def test_pooled_inputs_are_not_masked() -> None:
    batches = text_batches(4)
    model = make_bert()
    result = run(model, iter(batches), lora(tau=1.0), method="gram")
    x = layer_inputs(model, batches, ["pooler.dense"])["pooler.dense"]
    assert x.shape == (16, 32)
    assert lost(result.components["pooler.dense"], x) < 1e-6


class Shaped(nn.Module):
    """An embedding, then layers that see the tokens in other layouts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(VOCABULARY, 20)
        self.names = ("usual", "flat", "seq_first", "non_contiguous")
        for name in self.names:
            self.add_module(name, nn.Linear(20, 20))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        self.flat(x.flatten(0, 1))
        self.seq_first(x.transpose(0, 1))
        self.non_contiguous(x.mT.contiguous().mT)
        return self.usual(x)


def test_every_layout_of_tokens_gives_the_same_result() -> None:
    batches = text_batches(4, length=20, samples=5)
    model = Shaped()
    result = run(model, iter(batches), lora(tau=1.0), method="gram")
    for name in model.names[1:]:
        a, b = result.components["usual"], result.components[name]
        torch.testing.assert_close(
            result.singular_values[name], result.singular_values["usual"], rtol=1e-4, atol=1e-4
        )
        assert angle(a[:4], b[:4]) < 1e-3, name


def test_input_that_fits_no_mask_warns_once() -> None:
    class Doubled(Shaped):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(input_ids)
            return self.usual(torch.cat([x, x[:, :3]], 1))

    batches = text_batches(5)
    with pytest.warns(eva_kernels.EvaWarning, match="usual: no token mask fits") as caught:
        run(Doubled(), iter(batches), lora(tau=1.0, target_modules=["usual"]))
    assert len(caught) == 1  # once for the layer, not once a batch


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("kind", ["packed", "chunks"])
def test_inputs_that_need_no_mask_do_not_warn(kind: str) -> None:
    """Packed tokens without padding, and texts of several chunks each."""

    class Without(Shaped):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            if kind == "packed":
                return self.usual(self.embed(input_ids[attention_mask.bool()]))
            return self.usual(self.embed(input_ids).mean(-2).mean(1))

    batches = text_batches(4)
    for batch in batches if kind == "chunks" else ():
        batch |= {key: value.view(2, 2, -1) for key, value in batch.items()}
    result = run(Without(), iter(batches), lora(tau=1.0, target_modules=["usual"]))
    kept = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert result.tokens == (kept if kind == "packed" else 2 * 4)


def test_without_a_mask_every_token_counts() -> None:
    batches = [{"input_ids": b["input_ids"]} for b in text_batches(3, padded=False)]
    assert run(make_llama(), iter(batches), lora(tau=1.0)).tokens == 3 * 4 * 24
    square = torch.zeros(4, 1, 24, 24)  # which token sees which: no padding mask
    for batch in batches:
        batch["attention_mask"] = square
    assert run(make_llama(), iter(batches), lora(tau=1.0)).tokens == 3 * 4 * 24


def test_embeddings_as_input_are_masked_as_ids() -> None:
    model, batches = make_llama(), text_batches(3, labels=True)
    table = model.get_input_embeddings()
    for batch in batches:
        batch["labels"][:, :3] = -100
    with torch.no_grad():
        embedded = [{**b, "inputs_embeds": table(b["input_ids"])} for b in batches]
    for batch in embedded:
        del batch["input_ids"]
    check_close(
        run(make_llama(), iter(embedded), lora(tau=1.0), method="gram"),
        run(make_llama(), iter(batches), lora(tau=1.0), method="gram"),
    )


def test_encoder_and_decoder_have_their_own_masks() -> None:
    torch.manual_seed(7)
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = T5Config(
        vocab_size=VOCABULARY, **size, decoder_start_token_id=0, tie_word_embeddings=False
    )
    model = T5ForConditionalGeneration(config).eval()
    batches = text_batches(4)
    for i, batch in enumerate(batches):
        # as long as the input on purpose: only the stream tells the two masks apart
        labels = text_batches(1, seed=50 + i, padded=False)[0]["input_ids"]
        labels[:, 15:] = -100
        labels[0, 5:] = -100
        batch["labels"] = labels
    result = run(model, iter(batches), lora(tau=1.0), method="gram")
    encoder = "encoder.block.0.layer.0.SelfAttention.q"
    decoder = "decoder.block.0.layer.0.SelfAttention.q"
    cross_q = "decoder.block.0.layer.1.EncDecAttention.q"
    cross_k = "decoder.block.0.layer.1.EncDecAttention.k"
    names = [encoder, decoder, cross_q, cross_k]
    rows: dict[str, list[Tensor]] = {n: [] for n in names}
    for batch in batches:
        full = {**batch, "decoder_input_ids": model._shift_right(batch["labels"])}
        x = layer_inputs(model, [full], names, masked=False)
        masks = dict.fromkeys((decoder, cross_q), batch["labels"] != -100)
        masks |= {n: batch["attention_mask"].bool() for n in (encoder, cross_k)}
        for name in names:
            rows[name].append(x[name][masks[name].flatten()])
    for name in names:
        assert lost(result.components[name], torch.cat(rows[name])) < 1e-6, name


def test_experts_of_encoder_and_decoder_have_their_own_masks() -> None:
    main, decoder = (torch.tensor(m) == 1 for m in ([[1, 1, 0], [1, 0, 0]], [[0, 1, 1], [1, 1, 1]]))
    mask, tokens = TokenMask(main, decoder=decoder, encoder_decoder=True), torch.tensor([5, 1, 2])
    for part, kept in (("encoder", [1]), ("decoder", [0, 1, 2]), ("encoder", [1])):
        name = f"{part}.block.1.layer.1.mlp.experts.expert_0.wi"
        fits, rows = mask.rows_of_selected(tokens, main.numel(), name)
        assert fits
        assert (list(range(3)) if rows is None else rows.tolist()) == kept


def test_encoder_decoder_layers_with_other_names() -> None:
    encoder, decoder = torch.ones(2, 4).bool(), torch.ones(2, 4).bool()
    encoder[:, 1:], decoder[:, 3:] = False, False
    rule = TokenMask(encoder, decoder, encoder_decoder=True)
    for name, count in (("lm_head", 6), ("enc_to_dec_proj", 2), ("model.encoder.fc", 2)):
        rows = rule.rows(torch.Size((2, 4, 8)), torch.device("cpu"), name)
        assert rows is not None
        assert len(rows) == count
    # other tokens beside text are beside the encoder's text
    rule = TokenMask(encoder, decoder[:, 1:], encoder_decoder=True, text_first=True)
    rows = rule.rows(torch.Size((2, 6, 8)), torch.device("cpu"), "decoder.proj")
    assert rows is not None
    assert rows.tolist() == [0, 4, 5, 6, 10, 11]


def test_decoder_mask_applies_where_the_config_names_no_decoder() -> None:
    main, decoder = torch.ones(2, 3), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    rule = mask_of_batch({"attention_mask": main, "decoder_attention_mask": decoder}, lora())
    rows = rule.rows(torch.Size((2, 4, 8)), torch.device("cpu"), "layer")
    assert rows is not None
    assert rows.tolist() == [0, 1, 2, 4]


def test_layer_names_are_ignored_in_batches_of_only_text() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    rule = mask_of_batch({"input_ids": mask, "attention_mask": mask}, lora())
    rows = rule.rows(torch.Size((2, 4, 8)), torch.device("cpu"), "image_writer.layers.0.fc1")
    assert rows is not None
    assert rows.tolist() == [0, 1, 2, 4]
    with pytest.warns(eva_kernels.EvaWarning, match="no token mask fits"):  # text has no frames
        assert rule.rows(torch.Size((2, 2, 8)), torch.device("cpu"), "speech_writer.fc1") is None


def test_cross_attention_beside_images() -> None:
    """Layers of text attend to images; layers of images may attend to text."""
    text = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    rule = TokenMask(text, multimodal=True, has_media=True)
    images = "language_model.layers.1.cross_attn.k_proj"
    texts = "detr_encoder.layers.0.cross_attn.k_proj"
    shape, cpu = torch.Size((2, 4, 8)), torch.device("cpu")
    assert rule.rows(shape, cpu, images) is None
    scores = TokenMask(text, multimodal=True)  # no images, so that there is only text
    for one, name in ((rule, texts), (scores, images)):
        rows = one.rows(shape, cpu, name)
        assert rows is not None
        assert rows.tolist() == [0, 1, 2, 4]
    assert rule.rows(torch.Size((2, 9, 8)), cpu, texts) is None  # images again


def test_image_boxes_as_many_as_words_have_their_own_mask() -> None:
    text, boxes = (torch.tensor(m) == 1 for m in ([[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 1, 0]]))
    rule = TokenMask(text, multimodal=True, non_text_mask=boxes)
    for name, mask in (("visual_projection", boxes), ("layer.0.query", text)):
        rows = rule.rows(torch.Size((2, 3, 8)), torch.device("cpu"), name)
        assert rows is not None
        assert rows.tolist() == mask.flatten().nonzero().flatten().tolist()


def test_interleaved_streams() -> None:
    """A Decision Transformer's layers see three tokens per time step."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    config = type("Config", (), {"model_type": "decision_transformer"})
    found = mask_of_batch({"attention_mask": mask}, lora(), Architecture(config()))
    rows = found.rows(torch.Size((2, 9, 8)), torch.device("cpu"), "c_attn")
    assert rows is not None
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    config.model_type = "gpt2"
    found = mask_of_batch({"attention_mask": mask}, lora(), Architecture(config()))
    with pytest.warns(eva_kernels.EvaWarning, match="no token mask fits"):
        assert found.rows(torch.Size((2, 9, 8)), torch.device("cpu"), "c_attn") is None


def test_rows_of_a_mask_for_each_shape() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    cpu = torch.device("cpu")
    rule = TokenMask(mask)
    for shape, expected in (
        ((2, 3, 8), [0, 1, 3]),
        ((6, 8), [0, 1, 3]),
        ((3, 2, 8), [0, 1, 2]),  # sequence first: positions (0,0), (0,1), (1,0)
        ((2, 1, 3, 8), [0, 1, 3]),  # one head
        ((2, 2, 3, 8), [0, 1, 3, 4, 6, 9]),  # two heads, tokens last
        ((2, 3, 2, 8), [0, 1, 2, 3, 6, 7]),  # two heads, tokens first
        ((2, 3, 3, 8), [0, 1, 3, 4, 9]),  # pairs of tokens, rather than three heads
    ):
        rows = rule.rows(torch.Size(shape), cpu, "layer")
        assert rows is not None
        assert rows.tolist() == expected
    assert rule.rows(torch.Size((2, 8)), cpu, "pooled") is None
    assert rule.rows(torch.Size((8,)), cpu, "a_vector") is None
    assert rule.rows(torch.Size((1, 7, 8)), cpu, "positions") is None  # of all samples
    assert TokenMask(torch.ones(2, 3).bool()).rows(torch.Size((2, 3, 8)), cpu, "x") is None
    single = TokenMask(mask[:, 1:2])  # samples of one token each
    rows = single.rows(torch.Size((2, 1, 1, 8)), cpu, "head")
    assert rows is not None
    assert rows.tolist() == [0]
    assert single.rows(torch.Size((2, 8)), cpu, "pooled") is None


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_unmasked_prefix_is_masked_where_it_reads_the_text() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    rule, cpu = TokenMask(mask, unmasked_prefixes=("guard.",), text_first=True), torch.device("cpu")
    rows = rule.rows(torch.Size((2, 3, 8)), cpu, "guard.query")
    assert rows is not None
    assert rows.tolist() == [0, 1, 3]
    for shape in ((2, 5, 8), (6, 8), (4, 3, 8)):  # other tokens
        assert rule.rows(torch.Size(shape), cpu, "guard.query") is None

"""With ``forward_fn``, the mask is that of the call of the model, not that of the batch."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from eva_kernels import check_padding
from integration.conftest import (
    VOCABULARY,
    check_shares,
    layer_inputs,
    lora,
    lost,
    make_bert,
    make_llama,
    make_mlp,
    run,
    text_batches,
    vectors,
    wrapped,
)

EXACT: dict[str, Any] = {"method": "gram", "max_steps": 4}
Q_PROJ = lora(target_modules=["q_proj"], tau=1.0)
TEXTS = text_batches(4)


def as_text(batch: dict[str, Tensor]) -> list[str]:
    kept = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    return [" ".join(str(i) for i, keep in zip(*row, strict=True) if keep) for row in kept]


def tokenised(lines: list[str]) -> dict[str, Tensor]:
    rows = [torch.tensor(list(map(int, line.split()))) for line in lines]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def assert_same(result: Any, expected: Any, prefix: str = "") -> None:
    assert result.tokens == expected.tokens
    for name, rows in expected.components.items():
        assert lost(rows, result.components[prefix + name].double()) < 1e-6


def test_shared_input_keeps_the_mask_of_its_own_call() -> None:
    """After the first batch, the first of two calls skips ``b``."""

    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x: Tensor, attention_mask: Tensor, both: bool) -> Tensor:
            return self.a(x) + (self.b(x) if both else 0.0)

    def forward(model: nn.Module, x: Tensor) -> None:
        for half, mask, both in zip(x.chunk(2), masks, (x is data[0], True), strict=True):
            model(half[None], mask, both)

    data, masks = vectors(4), [torch.arange(20)[None] < n for n in (15, 4)]
    config = lora(target_modules=["a", "b"], tau=1.0)
    result = run(Sharing(), data, config, forward_fn=forward, early_exit=False, **EXACT)
    halves = [x.chunk(2) for x in data]
    kept = torch.cat([half[m[0]] for pair in halves for half, m in zip(pair, masks, strict=True)])
    assert lost(result.components["a"], kept) < 1e-6
    kept = torch.cat([halves[0][0][:15], *(second[:4] for _, second in halves)])
    assert lost(result.components["b"], kept) < 1e-6


@pytest.mark.parametrize("alone", [False, True])
def test_tokens_of_several_calls_add_up(alone: bool) -> None:
    """Also where a layer turns out to share no input, so that the first batch is run again."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.inner = nn.Linear(20, 20), nn.Linear(20, 20), make_mlp()

        def forward(self, x: Tensor) -> Tensor:
            once = self.a(x)
            return self.inner(once + self.b(x) + (self.a(x) if alone else 0))

    def forward(model: nn.Module, x: Tensor) -> None:
        for part in x.split([30, 10]):
            model(part)

    config = lora(target_modules=["a", "b", "inner.0"], tau=1.0)
    data = vectors(4)
    result = run(Model(), data, config, forward_fn=forward, max_tokens=81, **EXACT)
    assert (result.tokens, result.forwards) == (120, 3)
    assert lost(result.components["b"], torch.cat(data[:3])) < 1e-6


@pytest.mark.parametrize("adapted", [False, True])
def test_mask_of_text_tokenised_in_forward_fn_applies(adapted: bool) -> None:
    expected = run(make_llama(), TEXTS, Q_PROJ, **EXACT)
    result = run(
        wrapped(make_llama(), Q_PROJ) if adapted else make_llama(),
        [as_text(batch) for batch in TEXTS],
        Q_PROJ,
        forward_fn=lambda model, lines: model(**tokenised(lines)),
        **EXACT,
    )
    assert result.tokens == expected.tokens == sum(int(b["attention_mask"].sum()) for b in TEXTS)
    for name, rows in expected.components.items():
        torch.testing.assert_close(result.components[name], rows, atol=1e-4, rtol=0)


class Towers(nn.Module):
    """Two transformers models, each called with its own mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make_llama(), make_bert()

    def forward(self, lines: list[str], others: list[str]) -> None:
        self.first(**tokenised(lines))
        self.second(**tokenised(others))


def test_two_inner_models_use_their_own_masks() -> None:
    others = text_batches(4, length=30, seed=3)
    data = [(as_text(a), as_text(b)) for a, b in zip(TEXTS, others, strict=True)]
    config = lora(target_modules=["q_proj", "query"], tau=1.0)
    result = run(Towers(), data, config, forward_fn=lambda m, b: m(*b), **EXACT)
    for body, batches, kind in ((make_llama(), TEXTS, "first"), (make_bert(), others, "second")):
        names = [n for n in result.ranks if n.startswith(kind)]
        inputs = layer_inputs(body, batches, [n.removeprefix(f"{kind}.") for n in names])
        for name in names:
            rows = inputs[name.removeprefix(f"{kind}.")]
            assert lost(result.components[name], rows) < 1e-5, name


def test_inner_model_is_masked_after_its_pre_hook_has_failed() -> None:
    """Its own pre-hook raises before ours has recorded the arguments."""

    def too_long(module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        if kwargs["input_ids"].shape[1] > 20:
            raise ValueError("too long")

    def forward(model: Towers, lines: list[str]) -> None:
        with contextlib.suppress(ValueError):
            model(lines, [f"{line} {line}" for line in lines])
        model(lines, lines)

    towers = Towers()
    towers.second.register_forward_pre_hook(too_long, with_kwargs=True)
    data = [as_text(batch) for batch in TEXTS]
    config = lora(target_modules=["query"], tau=1.0)
    result = run(towers, data, config, forward_fn=forward, **EXACT)
    inputs = layer_inputs(make_bert(), TEXTS, [n.removeprefix("second.") for n in result.ranks])
    for name, rows in inputs.items():
        assert lost(result.components[f"second.{name}"], rows) < 1e-5, name


@pytest.mark.parametrize("taken_out", [False, True])  # as Trainer.compute_loss does
def test_labels_not_passed_on_by_forward_fn_still_mask(taken_out: bool) -> None:
    texts = text_batches(4, labels=True)
    for batch in texts:
        batch["labels"][:, :4] = -100
    expected = run(make_llama(), texts, Q_PROJ, **EXACT)

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        if taken_out:
            batch.pop("labels")
        model(**{key: value for key, value in batch.items() if key != "labels"})

    assert_same(run(make_llama(), texts, Q_PROJ, forward_fn=forward, **EXACT), expected)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("steps", [8, 4])
def test_decoder_labels_not_passed_on_by_forward_fn_still_mask(steps: int) -> None:
    """As where the function computes its own loss and passes the collator's decoder_input_ids.

    They do not if it passes other steps than they label.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_heads=4, decoder_start_token_id=0))
    texts = [
        {**text, "labels": text["input_ids"][:, :8].where(torch.arange(8) < (2 + i), -100)}
        for i, text in enumerate(TEXTS)
    ]

    def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {key: value for key, value in batch.items() if key != "labels"}
        return {**kept, "decoder_input_ids": model._shift_right(batch["labels"])[:, :steps]}

    config = lora(target_modules=["q", "k", "wo"], tau=1.0)
    expected = run(model, texts if steps == 8 else [*map(inputs, texts)], config, **EXACT)
    options = {"forward_fn": lambda model, batch: model(**inputs(batch)), **EXACT}
    assert_same(run(model, texts, config, **options), expected)


class DirectForward(nn.Module):
    """Calls ``forward`` of a transformers model directly, which runs no hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = make_llama()

    def forward(self, lines: list[str]) -> None:
        self.first.forward(**tokenised(lines))


@pytest.mark.parametrize("on_instance", [False, True])
def test_direct_call_of_forward_is_masked(on_instance: bool) -> None:
    expected = run(make_llama(), TEXTS, Q_PROJ, **EXACT)
    model, lines = DirectForward(), [as_text(batch) for batch in TEXTS]
    if on_instance:  # as accelerate's hooks set it
        model.first.forward = model.first.forward
    before = dict(vars(model.first))
    assert_same(
        run(model, lines, Q_PROJ, forward_fn=lambda m, b: m(b), **EXACT), expected, "first."
    )
    part = run(model.first, lines, Q_PROJ, forward_fn=lambda _, b: model(b), **EXACT)
    assert_same(part, expected)
    assert vars(model.first) == before


class LayerBehindModel(nn.Module):
    """A linear layer behind a transformers model that reads another input."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.direct, self.first, self.last = direct, make_llama(), nn.Linear(12, 8)

    def forward(self, lines: list[str], **given: Any) -> Tensor:
        (self.first.forward if self.direct else self.first)(**tokenised(lines))
        return torch.as_tensor(self.last(given["x"]))


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("given", ["mask", "masks", "longer"])
def test_layer_behind_an_inner_model_uses_the_outer_mask(given: str, direct: bool) -> None:
    """The mask passed by forward_fn counts, not the batch's, which keeps the other tokens."""
    torch.manual_seed(0)
    x, kept = torch.randn(4, 4, 16, 12), torch.rand(4, 4, 16) > 0.4
    data = [
        {"lines": as_text(text), "x": x[i], "kept": kept[i], "attention_mask": ~kept[i]}
        for i, text in enumerate(TEXTS)
    ]

    def forward(model: nn.Module, batch: dict[str, Any]) -> None:
        mask = {"full_attention": batch["kept"]} if given == "masks" else batch["kept"]
        if given == "longer":  # and without a mask
            model(lines=batch["lines"], x=torch.cat([batch["x"], batch["x"].flip(0)], 1))
        else:
            model(lines=batch["lines"], x=batch["x"], attention_mask=mask)

    config = lora(target_modules=["last", "q_proj"], tau=1.0)
    result = run(LayerBehindModel(direct), data, config, forward_fn=forward, **EXACT)
    check_shares(result, "last", x.reshape(-1, 12) if given == "longer" else x[kept])


class ImageModel(nn.Module):
    """Image patches and a prompt of as many tokens, as in diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.prompt = nn.Linear(16, 8), nn.Linear(10, 8)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = sample if sample.dim() == 3 else sample.flatten(2).mT
        return self.patches(x) + self.prompt(encoder_hidden_states)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("pixels", [(4, 4), ()], ids=["grid", "packed"])
def test_mask_of_the_prompt_does_not_mask_image_patches(pixels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    data = [
        {
            "sample": torch.randn(4, 16, *(pixels or (16,))),
            "prompt": torch.randn(4, 16, 10),
            "attention_mask": (torch.arange(16) < torch.tensor([16, 9, 7, 3])[:, None]).long(),
        }
        for _ in range(4)
    ]
    config = lora(target_modules=["patches"], tau=1.0)
    result = run(
        ImageModel(), data, config, forward_fn=lambda m, b: m(b["sample"], b["prompt"]), **EXACT
    )
    assert result.tokens == 4 * 4 * 16


def test_batch_mask_applies_where_the_model_receives_none() -> None:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(batch["x"])

    mask = torch.rand(8, 40) > 0.4
    data = [{"x": x[None], "attention_mask": m[None]} for x, m in zip(vectors(), mask, strict=True)]
    config = lora(target_modules=["0"], tau=1.0)
    assert run(make_mlp(), data, config, forward_fn=forward, **EXACT).tokens == mask[:4].sum()
    model = make_llama()  # only a part is called: the batch alone has a mask
    part = run(
        model,
        TEXTS,
        Q_PROJ,
        forward_fn=lambda m, b: m.model(input_ids=b["input_ids"]),
        **EXACT,
    )
    assert part.tokens == sum(int(b["attention_mask"].sum()) for b in TEXTS)


class SpeechToText(nn.Module):
    """Audio and text of as many tokens, with argument names as in openai-whisper."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(8, 16)
        self.words, self.decoder = nn.Embedding(96, 16), Decoder()

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        return self.decoder(self.words(tokens), self.encoder(mel))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, xa: Tensor) -> Tensor:
        return self.first(x) @ self.key(xa).mT


@pytest.mark.parametrize("frames", [7, 9])
def test_labels_mask_the_decoder_and_not_the_audio(frames: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    ids = [torch.randint(1, 96, (3, 7), generator=generator) for _ in range(4)]
    data = [
        {
            "input_ids": torch.randn(3, frames, 8, generator=generator),
            "dec_input_ids": each * kept,
            "labels": each.masked_fill(~kept, -100),
        }
        for each in ids
    ]

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(batch["input_ids"], batch["dec_input_ids"])

    names, model = ["encoder", "decoder.first"], SpeechToText().eval()
    config = lora(tau=1.0, target_modules=names)
    result = run(model, data, config, forward_fn=forward, **EXACT)
    named = [{"mel": b["input_ids"], "tokens": b["dec_input_ids"]} for b in data]
    inputs = layer_inputs(model, named, names)
    rows = kept.flatten().repeat(4)
    assert lost(result.components["encoder"], inputs["encoder"]) < 1e-6
    assert lost(result.components["decoder.first"], inputs["decoder.first"][rows]) < 1e-6


@pytest.mark.parametrize("method", ["gram", "sketch"])
def test_forward_fn_in_inference_mode_gives_the_same_result(method: str) -> None:
    options = {"max_steps": 4, "method": method}

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(**batch)

    expected = run(make_llama(), TEXTS, Q_PROJ, forward_fn=forward, **options)
    in_inference_mode = torch.inference_mode()(forward)
    result = run(make_llama(), TEXTS, Q_PROJ, forward_fn=in_inference_mode, **options)
    for name, rows in expected.components.items():
        assert torch.equal(rows, result.components[name]), name
        assert not result.components[name].is_inference()


def test_draw_limit_and_removal_of_hooks_with_forward_fn() -> None:
    model, lines = make_llama(), [as_text(batch) for batch in TEXTS]
    before = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]

    def forward(model: nn.Module, batch: list[str]) -> None:
        model(**tokenised(batch))

    result = run(model, lines, Q_PROJ, forward_fn=forward, tokens_per_step=20, **EXACT)
    assert result.tokens == 4 * 20
    with pytest.raises(ValueError, match="invalid literal"):
        run(model, [["one"]], Q_PROJ, forward_fn=forward)
    after = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert before == after


class Prefixed(nn.Module):
    """A text decoder with projected features in front of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.lm, self.project = make_llama(), nn.Linear(20, 3 * 64)

    def forward(
        self, input_ids: Tensor, features: Tensor, attention_mask: Tensor, labels: Any = None
    ) -> Any:
        text = self.lm.get_input_embeddings()(input_ids)
        front = self.project(features).view(-1, 3, 64)
        mask = torch.cat([attention_mask.new_ones(len(front), 3), attention_mask], 1)
        return self.lm(inputs_embeds=torch.cat([front, text], 1), attention_mask=mask)


class TwoTexts(nn.Module):
    """Two texts with an encoder each: of transformers, of torch, or called without hooks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.words = kind, nn.Embedding(VOCABULARY, 32)
        torch.manual_seed(7)
        layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)
        self.asked, self.found = (
            nn.TransformerEncoder(layer, 2) if "torch" in kind else make_bert() for _ in range(2)
        )

    def read(self, encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        if "torch" in self.kind:
            x: Tensor = encoder(self.words(ids), src_key_padding_mask=mask == 0)
            return x[:, 0]
        call = encoder.forward if self.kind == "direct" else encoder
        return call(ids, attention_mask=mask).pooler_output

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, ids: Tensor, mask: Tensor
    ) -> Tensor:
        asked = self.read(self.asked, input_ids, attention_mask)
        return asked @ self.read(self.found, ids, mask).mT


def test_inner_model_with_a_longer_mask_than_the_batch() -> None:
    model, kept = Prefixed().eval(), []
    batches = [{**b, "features": torch.randn(4, 20)} for b in TEXTS]
    for batch in batches:
        front = batch["attention_mask"].new_ones(4, 3)
        kept.append(torch.cat([front, batch["attention_mask"]], 1).bool().flatten())
    result = run(model, batches, lora(target_modules=["q_proj"], tau=1.0), **EXACT)
    assert result.tokens == int(torch.cat(kept).sum())
    for name, x in layer_inputs(model, batches, list(result.components), False).items():
        assert lost(result.components[name], x[torch.cat(kept)]) < 1e-6


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
@pytest.mark.parametrize("kind", ["transformers", "torch", "torch, forward_fn", "direct"])
@pytest.mark.parametrize("length", [24, 17])
def test_two_encoders_of_which_one_has_the_batch_mask(length: int, kind: str) -> None:
    others = text_batches(4, length=length, seed=1)
    batches = [
        {**b, "ids": o["input_ids"], "mask": o["attention_mask"]}
        for b, o in zip(TEXTS, others, strict=True)
    ]
    model = TwoTexts(kind).eval()
    forwards = [vars(part).get("forward") for part in (model.asked, model.found)]
    layers = lora(target_modules=["linear1", "linear2", "query", "output.dense"], tau=1.0)
    options = {"forward_fn": lambda model, b: model(**b)} if kind == "torch, forward_fn" else {}
    result = run(model, batches, layers, **options, **EXACT)
    assert [vars(part).get("forward") for part in (model.asked, model.found)] == forwards
    for name, x in layer_inputs(model, batches, list(result.components), False).items():
        own = "mask" if name.startswith("found") else "attention_mask"
        kept = torch.cat([b[own].bool().flatten() for b in batches])
        assert lost(result.components[name], x[kept]) < 1e-6, name


def test_batch_with_keys_other_than_strings() -> None:
    def forward(model: nn.Module, batch: Any) -> None:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    numbered = [{**batch, 7: torch.ones(4, 3)} for batch in TEXTS]
    result = run(make_llama(), numbered, Q_PROJ, forward_fn=forward, **EXACT)
    expected = run(make_llama(), TEXTS, Q_PROJ, forward_fn=forward, **EXACT)
    assert_same(result, expected)
    found = check_padding(make_llama(), numbered[0], Q_PROJ, forward_fn=forward)
    assert found.changed == ("input_ids",)

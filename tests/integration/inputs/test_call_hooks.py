"""With a forward_fn, the mask is that of what the model is called with."""

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


def same(result: Any, expected: Any, prefix: str = "") -> None:
    assert result.tokens == expected.tokens
    for name, rows in expected.components.items():
        assert lost(rows, result.components[prefix + name].double()) < 1e-6


def test_what_waits_for_another_layer_has_the_mask_of_its_call() -> None:
    """In the first of two calls ``b`` is left out, but for the first batch."""

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
def test_the_tokens_of_several_calls_are_added_up(alone: bool) -> None:
    """Also where a layer turns out to be alone, so that the first batch is run once more for it."""

    class Other(nn.Module):
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
    result = run(Other(), data, config, forward_fn=forward, max_tokens=81, **EXACT)
    assert (result.tokens, result.forwards) == (120, 3)
    assert lost(result.components["b"], torch.cat(data[:3])) < 1e-6


@pytest.mark.parametrize("adapted", [False, True])
def test_text_that_the_function_tokenises(adapted: bool) -> None:
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
    """Two models of transformers, each called with a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make_llama(), make_bert()

    def forward(self, lines: list[str], others: list[str]) -> None:
        self.first(**tokenised(lines))
        self.second(**tokenised(others))


def test_models_in_a_model() -> None:
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


def test_a_model_in_a_model_that_fails_before_it_runs() -> None:
    """Its own hook fails, before ours has seen what it was called with."""

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


def test_labels_that_the_function_does_not_pass_on() -> None:
    texts = text_batches(4, labels=True)
    for batch in texts:
        batch["labels"][:, :4] = -100
    expected = run(make_llama(), texts, Q_PROJ, **EXACT)

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(**{key: value for key, value in batch.items() if key != "labels"})

    same(run(make_llama(), texts, Q_PROJ, forward_fn=forward, **EXACT), expected)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_labels_of_a_decoder_that_the_function_does_not_pass_on() -> None:
    """As for a loss of its own, to which a collator's decoder_input_ids belong."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_heads=4, decoder_start_token_id=0))
    texts = [
        {**text, "labels": text["input_ids"][:, :8].where(torch.arange(8) < (2 + i), -100)}
        for i, text in enumerate(TEXTS)
    ]
    config = lora(target_modules=["q", "k", "wo"], tau=1.0)
    expected = run(model, texts, config, **EXACT)

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        kept = {key: value for key, value in batch.items() if key != "labels"}
        model(**kept, decoder_input_ids=model._shift_right(batch["labels"]))

    same(run(model, texts, config, forward_fn=forward, **EXACT), expected)


class Straight(nn.Module):
    """Calls ``forward`` of a model of transformers itself, which runs no hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first = make_llama()

    def forward(self, lines: list[str]) -> None:
        self.first.forward(**tokenised(lines))


@pytest.mark.parametrize("own", [False, True])
def test_forward_that_is_called_itself(own: bool) -> None:
    expected = run(make_llama(), TEXTS, Q_PROJ, **EXACT)
    model, lines = Straight(), [as_text(batch) for batch in TEXTS]
    if own:  # as accelerate's hooks set it
        model.first.forward = model.first.forward
    before = dict(vars(model.first))
    same(run(model, lines, Q_PROJ, forward_fn=lambda m, b: m(b), **EXACT), expected, "first.")
    part = run(model.first, lines, Q_PROJ, forward_fn=lambda _, b: model(b), **EXACT)
    same(part, expected)
    assert vars(model.first) == before


class Behind(nn.Module):
    """A layer of its own, behind a model of transformers that reads something else."""

    def __init__(self, straight: bool) -> None:
        super().__init__()
        self.straight, self.first, self.last = straight, make_llama(), nn.Linear(12, 8)

    def forward(self, lines: list[str], **given: Any) -> Tensor:
        (self.first.forward if self.straight else self.first)(**tokenised(lines))
        return torch.as_tensor(self.last(given["x"]))


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("given", ["mask", "masks", "longer"])
def test_layers_behind_a_model_that_has_another_mask(given: str, straight: bool) -> None:
    """What the function gives counts, not the mask of the batch, which keeps the others."""
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
    result = run(Behind(straight), data, config, forward_fn=forward, **EXACT)
    check_shares(result, "last", x.reshape(-1, 12) if given == "longer" else x[kept])


class Painter(nn.Module):
    """Images in patches, and the text of a prompt, of as many tokens: as models of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.prompt = nn.Linear(16, 8), nn.Linear(10, 8)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = sample if sample.dim() == 3 else sample.flatten(2).mT
        return self.patches(x) + self.prompt(encoder_hidden_states)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("pixels", [(4, 4), ()], ids=["grid", "packed"])
def test_a_mask_of_something_else(pixels: tuple[int, ...]) -> None:
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
        Painter(), data, config, forward_fn=lambda m, b: m(b["sample"], b["prompt"]), **EXACT
    )
    assert result.tokens == 4 * 4 * 16


def test_the_mask_of_the_batch_where_the_model_is_given_none() -> None:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(batch["x"])

    mask = torch.rand(8, 40) > 0.4
    data = [{"x": x[None], "attention_mask": m[None]} for x, m in zip(vectors(), mask, strict=True)]
    config = lora(target_modules=["0"], tau=1.0)
    assert run(make_mlp(), data, config, forward_fn=forward, **EXACT).tokens == mask[:4].sum()
    model = make_llama()  # a part of it alone: nothing is known but the batch
    part = run(
        model,
        TEXTS,
        Q_PROJ,
        forward_fn=lambda m, b: m.model(input_ids=b["input_ids"]),
        **EXACT,
    )
    assert part.tokens == sum(int(b["attention_mask"].sum()) for b in TEXTS)


class Writes(nn.Module):
    """Sound and text of as many tokens, by names of its own, as in Whisper of OpenAI."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.words, self.decoder = nn.Linear(8, 16), nn.Embedding(96, 16), Looks()

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        return self.decoder(self.words(tokens), self.encoder(mel))


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, xa: Tensor) -> Tensor:
        return self.first(x) @ self.key(xa).mT


@pytest.mark.parametrize("frames", [7, 9])
def test_labels_of_what_a_decoder_reads_beside_something_else(frames: int) -> None:
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

    names, model = ["encoder", "decoder.first"], Writes().eval()
    config = lora(tau=1.0, target_modules=names)
    result = run(model, data, config, forward_fn=forward, **EXACT)
    named = [{"mel": b["input_ids"], "tokens": b["dec_input_ids"]} for b in data]
    inputs = layer_inputs(model, named, names)
    rows = kept.flatten().repeat(4)
    assert lost(result.components["encoder"], inputs["encoder"]) < 1e-6
    assert lost(result.components["decoder.first"], inputs["decoder.first"][rows]) < 1e-6


@pytest.mark.parametrize("method", ["gram", "sketch"])
def test_a_function_in_inference_mode(method: str) -> None:
    options = {"max_steps": 4, "method": method}

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(**batch)

    expected = run(make_llama(), TEXTS, Q_PROJ, forward_fn=forward, **options)
    quiet = torch.inference_mode()(forward)
    result = run(make_llama(), TEXTS, Q_PROJ, forward_fn=quiet, **options)
    for name, rows in expected.components.items():
        assert torch.equal(rows, result.components[name]), name
        assert not result.components[name].is_inference()


def test_draws_and_hooks() -> None:
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
    """A decoder of text with something else in front of it, as a user writes one."""

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
    """Two texts, each for an encoder of its own: of transformers or torch, or run without hooks."""

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
        call = encoder.forward if self.kind == "straight" else encoder
        return call(ids, attention_mask=mask).pooler_output

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, ids: Tensor, mask: Tensor
    ) -> Tensor:
        asked = self.read(self.asked, input_ids, attention_mask)
        return asked @ self.read(self.found, ids, mask).mT


def test_a_model_in_a_users_module_that_is_told_of_more_than_the_batch() -> None:
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
@pytest.mark.parametrize("kind", ["transformers", "torch", "torch, a function", "straight"])
@pytest.mark.parametrize("length", [24, 17])
def test_two_texts_of_which_the_batch_calls_one_its_text(length: int, kind: str) -> None:
    others = text_batches(4, length=length, seed=1)
    batches = [
        {**b, "ids": o["input_ids"], "mask": o["attention_mask"]}
        for b, o in zip(TEXTS, others, strict=True)
    ]
    model = TwoTexts(kind).eval()
    forwards = [vars(part).get("forward") for part in (model.asked, model.found)]
    layers = lora(target_modules=["linear1", "linear2", "query", "output.dense"], tau=1.0)
    options = {"forward_fn": lambda model, b: model(**b)} if kind == "torch, a function" else {}
    result = run(model, batches, layers, **options, **EXACT)
    assert [vars(part).get("forward") for part in (model.asked, model.found)] == forwards
    for name, x in layer_inputs(model, batches, list(result.components), False).items():
        own = "mask" if name.startswith("found") else "attention_mask"
        kept = torch.cat([b[own].bool().flatten() for b in batches])
        assert lost(result.components[name], x[kept]) < 1e-6, name


def test_a_batch_whose_names_are_not_all_strings() -> None:
    def forward(model: nn.Module, batch: Any) -> None:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    numbered = [{**batch, 7: torch.ones(4, 3)} for batch in TEXTS]
    result = run(make_llama(), numbered, Q_PROJ, forward_fn=forward, **EXACT)
    expected = run(make_llama(), TEXTS, Q_PROJ, forward_fn=forward, **EXACT)
    same(result, expected)
    found = check_padding(make_llama(), numbered[0], Q_PROJ, forward_fn=forward)
    assert found.changed == ("input_ids",)

"""``tokens_per_step``: a reproducible random draw of the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from bench.families import FAMILIES
from eva_kernels import EvaError
from eva_peft.inputs.subsample import Draw
from integration.conftest import (
    exact_pca,
    layer_inputs,
    lora,
    lost,
    make_llama,
    make_mlp,
    run,
    text_batches,
    vectors,
)

LAYER = "model.layers.1.self_attn.o_proj"


def test_result_is_that_of_the_drawn_tokens() -> None:
    texts, limit = text_batches(5), 20
    result = run(
        make_llama(),
        iter(texts),
        lora(tau=1.0),
        method="gram",
        tokens_per_step=limit,
        seed=3,
        trim_padding=False,
    )
    assert result.tokens == 5 * limit
    inputs = layer_inputs(make_llama(), texts, [LAYER])[LAYER]  # the tokens that count
    begin, drawn = 0, []
    for forward, batch in enumerate(texts):
        count = int(batch["attention_mask"].sum())
        chosen = Draw(limit, 3, forward).indices(count)
        assert chosen is not None
        drawn.append(inputs[begin : begin + count][chosen])
        begin += count
    rows = torch.cat(drawn)
    assert lost(result.components[LAYER], rows) < 1e-6
    variances = exact_pca(rows)[0]
    torch.testing.assert_close(
        result.explained_variance_ratio[LAYER].double(),
        (variances / variances.sum())[:8],
        rtol=1e-3,
        atol=1e-6,
    )
    assert [len(g) for g in result.shared_inputs] == [3, 2, 3, 2]


def test_parts_of_a_trimmed_batch_share_the_limit() -> None:
    ids = torch.randint(1, 90, (8, 60))
    lengths = torch.tensor([60, 2, 2, 60, 2, 2, 2, 2])
    mask = (torch.arange(60) < lengths[:, None]).long()
    model, sizes = make_llama(), []
    model.register_forward_pre_hook(
        lambda m, a, k: sizes.append(len(k["input_ids"])), with_kwargs=True
    )
    options: dict[str, Any] = {"tokens_per_step": 66, "max_steps": 1}
    result = run(model, [{"input_ids": ids, "attention_mask": mask}], lora(), **options)
    assert sorted(sizes) == [2, 6]
    # 120 and 12 of the tokens: 60 and 6 are drawn
    assert result.tokens == 66


def test_parts_share_the_limit_where_the_model_narrows_the_mask() -> None:
    class WithoutFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_llama()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.inner(input_ids, attention_mask.index_fill(1, torch.tensor([0]), 0))

    mask = (torch.arange(60) < torch.tensor([60] * 2 + [3] * 30)[:, None]).long()
    batch, calls = {"input_ids": mask * 5, "attention_mask": mask}, []
    model = WithoutFirst()
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    result = run(model, [batch], lora(), tokens_per_step=40, max_steps=1)
    assert (len(calls), result.tokens) == (2, 40)


def test_parts_share_the_limit_by_tokens_that_count() -> None:
    """Of the long sample only four tokens have a label that counts."""
    ids = torch.randint(1, 90, (3, 60))
    mask = (torch.arange(60) < torch.tensor([60, 10, 9])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4:] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    result = run(make_llama(), [batch], lora(), tokens_per_step=20, max_steps=1)
    assert result.tokens == 20


@pytest.mark.parametrize(
    ("limit", "tokens", "limits"),
    [
        (66, [120, 12], [60, 6]),
        (1, [300, 60], [1, 0]),
        (3, [100, 100, 1], [2, 1, 0]),
        (14, [3, 4], [6, 8]),  # fewer tokens than the limit
        (5, [0], [5]),
    ],
)
def test_limits_of_parts_add_up(limit: int, tokens: list[int], limits: list[int]) -> None:
    draws = Draw(limit, 0, 0).split_over_parts(tokens)
    assert [draw.limit for draw in draws] == limits
    assert [draw.part for draw in draws] == list(range(len(tokens)))


@pytest.mark.filterwarnings("ignore:only 1 of 4 ranks could be given:eva_kernels.EvaWarning")
@pytest.mark.parametrize(("limit", "encoder", "decoder"), [(2000, 428, 96), (90, 90, 90)])
def test_each_stream_has_its_own_limit(limit: int, encoder: int, decoder: int) -> None:
    torch.manual_seed(0)
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=96, decoder_start_token_id=0, **size))
    mask = (torch.arange(400) < torch.tensor([400] + [4] * 7)[:, None]).long()
    batch = {"input_ids": mask * 5, "attention_mask": mask, "labels": torch.full((8, 12), 7)}
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    used = {}
    for name, count in zip(names, (encoder, decoder), strict=True):
        config = lora(target_modules=[name])
        used[name] = run(model, [batch], config, tokens_per_step=limit, max_steps=1).tokens
        assert used[name] == count
    if limit == 90:  # the tokens of a decoder without a mask are not known beforehand
        config = lora(target_modules=names[1:], use_label_mask=False)
        assert 0 < run(model, [batch], config, tokens_per_step=limit, max_steps=1).tokens <= limit


@pytest.mark.parametrize("name", ["T5", "Whisper", "ViT", "BERT with pooler, bare", "Mixtral"])
def test_no_layer_sees_more_tokens_than_the_limit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eva_kernels.streaming import InputStream

    family, limit, sizes = FAMILIES[name], 10, []
    original = InputStream.add

    def add(self: Any, x: Tensor, rows: Tensor | None = None) -> int:
        used = original(self, x, rows)
        sizes.append(used)
        return used

    monkeypatch.setattr(InputStream, "add", add)
    config = lora(tau=1.0, **family.config)
    data = family.make_batches(3)
    run(family.make_model(), iter(data), config, tokens_per_step=limit, trim_padding=False)
    assert max(sizes) == limit


def test_draw_does_not_depend_on_the_global_random_state() -> None:
    def drawn(**options: Any) -> Tensor:
        model, config = make_mlp(), lora(target_modules=["0"])
        torch.manual_seed(len(options))
        state = torch.get_rng_state()
        result = run(model, vectors(4), config, tokens_per_step=15, max_steps=4, **options)
        assert torch.equal(torch.get_rng_state(), state)
        return result.components["0"]

    assert torch.equal(drawn(), drawn(seed=0))
    assert not torch.equal(drawn(), drawn(seed=1))


def test_draw_depends_on_seed_batch_and_part() -> None:
    def drawn(**changes: int) -> Tensor:
        found = Draw(**{"limit": 10, "seed": 0, "batch_number": 0, **changes}).indices(50)
        assert found is not None
        assert (found.diff() > 0).all()
        return found

    others = [{"seed": 1}, {"batch_number": 1}, {"part": 1}, {"seed": -1}, {"seed": 2**62 + 9}]
    chosen = [drawn(), *(drawn(**changes) for changes in others)]
    assert len({tuple(each.tolist()) for each in chosen}) == len(chosen)
    mask, draw = torch.rand(5, 20) < 0.8, Draw(10, 0, 0)
    with torch.device("meta"):  # the default device of new tensors
        kept = draw.subset(mask)
    assert kept.shape == mask.shape
    assert int(kept.sum()) == int((kept & mask).sum()) == 10
    assert torch.equal(drawn(), draw.indices(50))


def test_every_token_is_equally_likely() -> None:
    counts = torch.zeros(50)
    draws = 4000
    for forward in range(draws):
        chosen = Draw(10, 0, forward).indices(50)
        assert chosen is not None
        assert len(chosen.unique()) == 10
        counts[chosen] += 1
    # binomial with p = 0.2: five standard deviations
    assert (counts / draws - 0.2).abs().max() < 5 * (0.2 * 0.8 / draws) ** 0.5
    assert Draw(50, 0, 0).indices(50) is None


def test_max_tokens_counts_drawn_tokens() -> None:
    config = lora(target_modules=["0", "2"], tau=1.0)
    result = run(make_mlp(), vectors(8), config, tokens_per_step=15, max_tokens=60)
    assert (result.tokens, result.forwards) == (60, 4)


def test_resumed_draws_are_those_of_an_uninterrupted_run(tmp_path: Any) -> None:
    config = lora(target_modules=["0", "2"], tau=1.0)
    options: dict[str, Any] = {"tokens_per_step": 15, "checkpoint": tmp_path / "c.safetensors"}
    run(make_mlp(), vectors(8), config, max_steps=3, **options)
    resumed = run(make_mlp(), vectors(8), config, max_steps=7, **options)
    whole = run(make_mlp(), vectors(8), config, max_steps=7, tokens_per_step=15)
    assert torch.equal(resumed.components["0"], whole.components["0"])
    with pytest.raises(EvaError, match="tokens_per_step: 15 in the file, 16 now"):
        run(make_mlp(), vectors(8), config, max_steps=9, **{**options, "tokens_per_step": 16})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "tokens_per_step=0 must be at least 1"),
        (-3, "tokens_per_step=-3 must be at least 1"),
        (2.5, "tokens_per_step=2.5 must be a whole number"),
        (True, "tokens_per_step=True must be a whole number"),
        ("9", "tokens_per_step='9' must be a whole number"),
    ],
)
def test_invalid_limits_are_errors(value: Any, message: str) -> None:
    with pytest.raises(EvaError, match=message):
        run(nn.Sequential(nn.Linear(20, 4)), vectors(1), lora(), tokens_per_step=value)


@pytest.mark.parametrize("made_by_function", [True, False])
def test_draws_differ_between_batches_with_forward_fn(made_by_function: bool) -> None:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(**batch)

    def by_number(model: nn.Module, batch: int) -> None:
        model(**texts[batch])

    texts, options = text_batches(3), {"method": "gram", "tokens_per_step": 20}
    config = lora(tau=1.0, target_modules=[LAYER])
    data, function = (range(3), by_number) if made_by_function else (texts, forward)
    found = run(make_llama(), iter(data), config, forward_fn=function, **options)
    inputs = layer_inputs(make_llama(), texts, [LAYER])[LAYER]
    parts = inputs.split([int(batch["attention_mask"].sum()) for batch in texts])
    drawn = [part[Draw(20, 0, number).indices(len(part))] for number, part in enumerate(parts)]
    assert lost(found.components[LAYER], torch.cat(drawn)) < 1e-6

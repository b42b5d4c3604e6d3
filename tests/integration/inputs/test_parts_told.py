"""Which parts of a model are looked at for what they are told, and what of that counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eva_peft.inputs.part_masks import parts_taking_masks
from integration.conftest import VOCABULARY, layer_inputs, lora, lost, make_bert, run, wrapped
from integration.inputs.test_part_masks import EXACT, KEPT, LENGTHS, Seen, batches


def test_layers_with_adapters_are_looked_at_where_those_within_may_be_told() -> None:
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


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor, lengths: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(x)


def nested(parts: list[Tensor], layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor(parts, layout=layout)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
@pytest.mark.parametrize("kind", ["nested", "jagged", "sparse"])
def test_tensors_that_cannot_be_read_tell_nothing(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.reads = nn.Embedding(VOCABULARY, 16), Reads()
            self.last = nn.Linear(16, 4)

        def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
            if kind == "sparse":
                mask = ids.ne(0).float().to_sparse()
                return self.last(self.reads(self.words(ids), lengths, mask))
            layout = torch.jagged if kind == "jagged" else torch.strided
            seen = nested([row[row != 0].ne(0) for row in ids], layout)
            x = nested([self.words(row[row != 0]) for row in ids], layout)
            return self.last(torch.nested.to_padded_tensor(self.reads(x, lengths, seen), 0.0))

    def tokens_of(args: Any, *_: Any) -> Tensor:
        x = args[0] if isinstance(args, tuple) else args
        return torch.cat(list(x.unbind())) if x.is_nested else x[KEPT]

    data = [{**batch, "lengths": LENGTHS} for batch in batches()]
    config = lora(target_modules=["inner", "last"])
    selected = {"reads.inner": tokens_of}
    result = run(Model().eval(), data, config, prepare_layer_inputs_fn=selected, **EXACT)
    assert result.tokens == 4 * int(KEPT.sum())


CONTEXT = torch.arange(5) < torch.tensor([2, 3, 5])[:, None]
ELSE = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


class Looks(nn.Module):
    """Attends to something else, and is told of that, or of nothing, or of its own tokens, too."""

    def __init__(self) -> None:
        super().__init__()
        self.asks, self.keys = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, context: Tensor, **told: Tensor) -> Tensor:
        return self.asks(x) + self.keys(context).mean(1, keepdim=True)


class Within(Seen):
    """Tells nobody within what it is told itself."""

    def __init__(self, told: dict[str, Tensor]) -> None:
        super().__init__()
        self.looks, self.told = Looks(), told

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.looks(super().forward(x, mask), ELSE, **self.told)


class Attends(nn.Module):
    def __init__(self, told: dict[str, Tensor], within: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 4)
        self.part, self.looks, self.told = Within(told) if within else Seen(), Looks(), told

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.part(self.words(ids), ids.ne(0))
        if not isinstance(self.part, Within):
            x = self.looks(x, ELSE, **self.told)
        return self.last(x)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("batch_tells", [False, True], ids=["", "batch"])
@pytest.mark.parametrize("within", [False, True], ids=["behind", "within"])
@pytest.mark.parametrize("kind", ["nothing", "mask", "lengths", "padding", "both"])
def test_a_part_that_is_told_of_others_keeps_what_is_known_of_its_own_tokens(
    kind: str, within: bool, batch_tells: bool
) -> None:
    told = {
        "nothing": {},
        "mask": {"context_mask": CONTEXT},
        "lengths": {"context_lengths": CONTEXT.sum(1)},
        "padding": {"memory_key_padding_mask": ~CONTEXT},
        "both": {"mask": KEPT, "context_mask": CONTEXT},
    }[kind]
    data = batches()
    data = [{**batch, "attention_mask": KEPT.long()} for batch in data] if batch_tells else data
    looks = "part.looks" if within else "looks"
    kept = {"part.behind": KEPT, f"{looks}.asks": KEPT, "last": KEPT}
    kept |= {f"{looks}.keys": CONTEXT} if kind != "nothing" else {}
    model = Attends(told, within).eval()
    result = run(model, data, lora(tau=1.0, target_modules=list(kept)), **EXACT)
    for name, x in layer_inputs(model, data, list(kept), masked=False).items():
        assert lost(result.components[name], x[kept[name].flatten().repeat(4)]) < 1e-6, name


class Blocks(nn.Module):
    """Hands on its tokens in one with their positions, as ESPnet's Conformer and Branchformer."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.behind = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(
            self, x_input: tuple[Tensor, Tensor], mask: Tensor
        ) -> tuple[tuple[Tensor, Tensor], Tensor]:
            x, places = x_input
            x = self.before(x) + places
            return (self.behind(x.tanh()), places), mask

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


def test_tokens_that_come_in_one_with_their_positions() -> None:
    model, data = Blocks().eval(), batches()
    names = [f"blocks.{i}.{part}" for i in range(2) for part in ("before", "behind")] + ["last"]
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names).items():
        assert lost(result.components[name], x[KEPT.flatten().repeat(4)]) < 1e-6, name
    assert result.tokens == 4 * int(KEPT.sum())


@pytest.mark.parametrize("own", [False, True], ids=["default", "forward_fn"])
@pytest.mark.parametrize("names", [(0, 1), (None, ("a", "to", "b"))], ids=["numbers", "tuples"])
def test_mappings_whose_names_are_no_strings(names: tuple[Any, Any], own: bool) -> None:
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
    options = {**EXACT, "forward_fn": lambda m, b: m(b)} if own else EXACT
    result = run(Model(), data, lora(target_modules=["reads"]), **options)
    assert result.tokens == 4 * 3 * 14


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 16)])
def test_what_is_no_tokens_is_not_attended_to(shape: tuple[int, ...]) -> None:
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


def test_a_mask_of_images_beside_a_number_for_each() -> None:
    class Paints(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads = nn.Linear(16, 4)

        def forward(
            self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
        ) -> Tensor:
            return self.reads(hidden_states)

    for given in (torch.tensor(1.0), torch.ones(3)):
        batch = {"hidden_states": torch.randn(3, 7, 16), "encoder_hidden_states": given}
        data = [{**batch, "attention_mask": KEPT}] * 4
        result = run(Paints(), data, lora(target_modules=["reads"]), **EXACT)
        assert result.tokens == 4 * int(KEPT.sum())


def test_a_mask_that_is_written_to_between_two_parts() -> None:
    """As where tokens are left out layer by layer."""

    class Prunes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.first, self.second = nn.Embedding(VOCABULARY, 16), Seen(), Seen()

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
def test_numbers_tell_where_they_are_added_to_scores(added: bool) -> None:
    """As those of PatchTST-FM; others of a name that says nothing may be anything."""

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

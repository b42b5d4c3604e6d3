"""Detection of products with expert weights, and of the tokens in routed inputs."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from eva_kernels.streaming import InputStream
from eva_peft.model.routing import ExpertWeight, RoutedInputs
from integration.conftest import VOCABULARY, check_shares, lora, make_llama, run, text_batches


def test_selection_along_another_dimension_is_not_tracked() -> None:
    called: list[Any] = []
    routed = RoutedInputs([], lambda *given: called.append(given))
    x, picked = torch.randn(5, 5, 3), torch.tensor([4, 0, 2, 1, 3])
    with routed:
        routed.tracks_tokens = True
        untracked = [x[:, picked], x.index_select(1, picked), x[:2, picked], x[..., picked[1:4]]]
        untracked += [x.index_select(np.int64(1), picked), x[picked, picked[:, None]]]
        untracked += [x[picked].index_select(index=picked, dim=1)]
        untracked += [x[picked][:, picked], x[picked, :4], x[picked].chunk(5, dim=1)[1]]
        tracked = [x[picked], x[picked, :], x[picked, ...], x[None, picked]]
        tracked += [
            x.index_select(0, picked),
            x.index_select(-3, picked),
            torch.index_select(x, index=picked, dim=0),
        ]
        tracked += [torch.index_select(dim=0, index=picked, input=x)]
        nothing_selected = x[picked < 0]
        assert all(routed.token_indices(part) is None for part in untracked)
        for part in tracked:
            known = routed.token_indices(part)
            assert known is not None
            assert torch.equal(x.reshape(25, 3)[known[0]], part.reshape(25, 3))
            assert known[1] == 25
        empty = routed.token_indices(nothing_selected)
        assert empty is not None
        assert len(empty[0]) == 0


def test_all_forms_of_a_matrix_product_are_detected() -> None:
    called: list[Any] = []
    weight, x = torch.randn(3, 5, 4), torch.randn(2, 4)
    weights = [(i + 10, ExpertWeight(weight, i)) for i in range(3)]
    linear, transposed_weight = nn.functional.linear, weight[1].T
    with RoutedInputs(weights, lambda *given: called.append(given)):
        products = [
            linear(x, weight[1]),
            torch.matmul(x, transposed_weight),
            torch.mm(x, transposed_weight),
        ]
        products += [x.matmul(transposed_weight), x.mm(transposed_weight), x @ transposed_weight]
    assert [(layer, id(given)) for layer, given in called] == [(11, id(x))] * len(products)


@pytest.mark.parametrize("product", [torch.bmm, Tensor.bmm, torch.matmul, operator.matmul])
def test_batched_products_of_all_experts_are_detected(product: Any) -> None:
    called: list[Any] = []
    memory = torch.randn(104)
    transposed_weight, weight = (memory[begin : begin + 48].view(3, 4, 4) for begin in (0, 52))
    parts = torch.randn(3, 2, 4)
    weights = [(i + 10, ExpertWeight(weight, i)) for i in (0, 2)]
    weights += [(i + 20, ExpertWeight(transposed_weight, i, transposed=True)) for i in (0, 1)]
    routed = RoutedInputs(weights, lambda *given: called.append(given))
    with routed:
        product(parts, weight.transpose(1, 2))
        assert [layer for layer, _ in called] == [10, 12]
        product(parts, transposed_weight)
        assert [layer for layer, _ in called] == [10, 12, 20, 21]
        assert all(torch.equal(given, parts[layer % 10]) for layer, given in called)
        product(parts[:2], transposed_weight[:2])  # not the weights of all experts
        product(parts, memory[51:99].view(3, 4, 4).mT)
        assert (len(called), routed.transposed_layers) == (4, set())
        product(parts, weight)
        assert routed.transposed_layers == {10, 12}
        product(parts, transposed_weight.mT)
        torch.matmul(parts[:1], transposed_weight)  # the same tokens for all experts
    assert (len(called), routed.transposed_layers) == (4, {10, 12, 20, 21})


def test_products_with_other_parts_of_a_parameter_are_ignored() -> None:
    called: list[int] = []
    weight = torch.randn(100)[4:52].view(3, 4, 4)  # at an offset in its storage
    x = torch.randn(2, 4)
    weights = [(i + 10, ExpertWeight(weight, i)) for i in (0, 2)]
    transposed_weights = [(i + 20, ExpertWeight(weight, i, transposed=True)) for i in (0, 2)]
    for watched in (weights, transposed_weights):
        routed = RoutedInputs(watched, lambda layer, given: called.append(layer))
        with routed:
            x @ weight[1]  # an expert that is not watched
            x @ weight[0][:2].T
            x @ weight.view(12, 4)[1:5]
            assert (called, routed.transposed_layers) == ([], set())
            x @ weight[2] if watched is transposed_weights else x @ weight[2].T
        assert (called.pop(), routed.transposed_layers) == (watched[1][0], set())


def test_parts_of_routed_inputs_are_tracked() -> None:
    x, order = torch.randn(6, 3), torch.tensor([4, 0, 2, 1, 3, 5])
    routed = RoutedInputs([], lambda *given: None)
    with routed:
        routed.tracks_tokens = True
        rows = x[order]
        cuts = [rows.split([2, 4]), torch.split(rows, 2), rows.chunk(3), torch.chunk(rows, 3)]
        for parts in [*cuts, rows.tensor_split([2]), torch.tensor_split(rows, 3)]:
            known = [routed.token_indices(part) for part in parts]
            assert torch.equal(torch.cat([k[0] for k in known if k is not None]), order)
            assert {k[1] for k in known if k is not None} == {6}
        tracked = {
            routed.token_indices(rows[order[:4]][order[1:3]]): order[order[:4]][order[1:3]],
            routed.token_indices(rows[:, 1:]): order,
            routed.token_indices(rows[2:4][..., 1:]): order[2:4],
            routed.token_indices(rows[None, 4:]): order[4:],
            routed.token_indices(rows[6:, :1]): order[6:],
            routed.token_indices(rows[3:, ...]): order[3:],
            routed.token_indices(torch.rand(6, 1) * rows): order,
            routed.token_indices(rows[None][0]): order,
            routed.token_indices(torch.cat(tensors=[rows, x], dim=1)): order,
            routed.token_indices(torch.concat((rows[2:4], rows[5:]))): order[[2, 3, 5]],
        }
        untracked = [x[2:4], rows[order.view(2, 3)], rows[order[:, None]], rows[order[0], None]]
        untracked += [rows[None][:, 2:4], rows.flip(0), rows.roll(1, 0)]
        untracked += [rows.take_along_dim(order[:, None], 0), torch.ones(6, 6) @ rows]
        untracked += [torch.cat([rows, x]), torch.cat([rows, x[:3][order % 3]])]
        samples = torch.randn(6, 2, 3)[order]
        untracked += [torch.cat([samples, samples], 1)]
        untracked += [samples.transpose(0, 1), samples.permute(1, 0, 2), samples.movedim(0, 1)]
        halves, partial = torch.empty_like(rows), rows.clone()
        halves[:3], halves[3:], partial[order > 2] = rows[:3], rows[3:], 0.0
        partial[order < 1] = torch.zeros(3)  # equal in each row
        tracked |= {routed.token_indices(halves): order, routed.token_indices(partial): order}
        assert all(routed.token_indices(part) is None for part in untracked)
    for known, tokens in tracked.items():
        assert known is not None
        assert torch.equal(known[0], tokens)
        assert known[1] == 6


def test_list_indices_and_repetitions_are_tracked() -> None:
    x, picked, rows = torch.randn(6, 3), [4, 0, 4], torch.arange(6)
    kept, none = [True, False] * 3, np.zeros(0)
    times = torch.tensor([1, 0, 2, 1, 1, 1])
    routed = RoutedInputs([], lambda *given: None)
    with routed:
        routed.tracks_tokens = True
        known = [
            (x[picked], picked),
            (x[None, picked], picked),
            (x[np.array(picked), 1:], picked),
            (x[range(2, 4)], [2, 3]),
            (x[kept], [0, 2, 4]),
            (x[[]], none),
            (x.repeat_interleave(2, dim=0), rows.repeat_interleave(2)),
            (torch.repeat_interleave(dim=-2, repeats=3, input=x), rows.repeat_interleave(3)),
            (x[picked].repeat_interleave(2, 0), [4, 4, 0, 0, 4, 4]),
        ]
        unknown = [x[[1, 4], [0, 2]][:, None], x[slice(2)], x.repeat_interleave(2, dim=1)]
        unknown += [x.repeat_interleave(times, dim=0), x[:0].repeat_interleave(2, dim=0)]
        unknown += [x[None].repeat_interleave(2, dim=0), x[:, [0, 2]]]
        for part, tokens in known:
            found = routed.token_indices(part)
            assert found is not None
            assert found[0].tolist() == list(tokens)
            assert found[1] == 6
        assert all(routed.token_indices(part) is None for part in unknown)


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8 is now deprecated")
def test_uint8_masks_are_tracked() -> None:
    x, order = torch.randn(6, 3), torch.tensor([4, 0, 2, 1, 3, 5])
    routed = RoutedInputs([], lambda *given: None)
    with routed:
        routed.tracks_tokens = True
        for kept in ([0, 1, 1, 0, 0, 1], [1] * 6):
            known = routed.token_indices(x[order][torch.tensor(kept, dtype=torch.uint8)])
            assert known is not None
            assert torch.equal(known[0], order[torch.tensor(kept, dtype=torch.bool)])


def test_token_indices_are_on_the_device_of_the_tokens() -> None:
    x, order = torch.randn(6, 3, device="meta"), torch.tensor([4, 0, 2])
    routed = RoutedInputs([], lambda *given: None)
    with routed:
        routed.tracks_tokens = True
        for part in (x[order], x[order][torch.tensor([1], device="meta")], x[order][[2, 0]]):
            known = routed.token_indices(part)
            assert known is not None
            assert (known[0].device, len(known[0]), known[1]) == (x.device, len(part), 6)


def test_operations_of_the_stream_are_not_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not part of the model, and are most of the first forward pass."""
    in_add, calls = [False], []
    add, follow = InputStream.add, RoutedInputs._track_result

    def noted_add(*given: Any) -> int:
        in_add[0] = True
        used = add(*given)
        in_add[0] = False
        return used

    def noted_follow(*given: Any) -> None:
        calls.append(in_add[0])
        follow(*given)

    monkeypatch.setattr(InputStream, "add", noted_add)
    monkeypatch.setattr(RoutedInputs, "_track_result", noted_follow)
    run(make_llama(), iter(text_batches(1)), lora(), method="sketch")
    assert calls
    assert not any(calls)


class Reordering(nn.Module):
    """Reorders all tokens for one layer, and restores their order for the next."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.how, self.embed = how, nn.Embedding(VOCABULARY, 12)
        self.inner, self.last = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        order = input_ids.flatten().argsort(stable=True)
        rows = self.inner(self.embed(input_ids).reshape(-1, 12)[order])
        wide, back = order[:, None].expand_as(rows), order.argsort()
        if self.how == "__setitem__":
            out = torch.empty_like(rows)
            out[order] = rows
        elif self.how == "gather":
            out = rows.gather(0, back[:, None].expand_as(rows))
        elif self.how == "embedding":
            out = nn.functional.embedding(back, rows)
        elif self.how == "index_put_":
            out = rows.new_zeros(rows.shape).index_put_((order,), rows)
        elif self.how in ("cat", "vstack"):  # the outputs of experts, concatenated
            out = getattr(torch, self.how)(rows.split(7))[back]
        else:
            place = wide if self.how.startswith("scatter") else order
            out = getattr(torch.zeros_like(rows), self.how)(0, place, rows)
        return self.last(out)


SCATTER_METHODS = [
    "index_add",
    "index_add_",
    "index_copy_",
    "index_put_",
    "scatter",
    "scatter_add_",
]


@pytest.mark.parametrize(
    "how", [*SCATTER_METHODS, "gather", "embedding", "__setitem__", "cat", "vstack"]
)
def test_masks_follow_tokens_back_to_their_order(how: str) -> None:
    model, texts = Reordering(how), text_batches(4, samples=6)
    config, options = lora(tau=1.0, target_modules=["inner", "last"]), {"trim_padding": False}
    result = run(model, iter(texts), config, method="gram", **options)
    ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in texts])
    with torch.no_grad():
        tokens = model.embed(ids)
        check_shares(result, "inner", tokens)
        check_shares(result, "last", model.inner(tokens))


class RecurrentModel(nn.Module):
    """Sorts samples by length for a recurrent network, and back; or lets torch do so."""

    def __init__(self, by_hand: bool, between: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by_hand, self.between, self.embed = by_hand, between, nn.Embedding(VOCABULARY, 12)
        self.network = nn.LSTM(12, 6, batch_first=True, bidirectional=True)
        self.last = nn.Linear(12, 4)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        lengths, order = attention_mask.sum(1), torch.arange(len(input_ids))
        if self.by_hand:
            lengths, order = lengths.sort(descending=True)
        options: dict[str, Any] = {"batch_first": True, "enforce_sorted": self.by_hand}
        packed = rnn.pack_padded_sequence(self.embed(input_ids)[order], lengths, **options)
        x, _ = rnn.pad_packed_sequence(self.network(packed)[0], batch_first=True)
        if self.between == "a function":
            x = x.tanh()
        elif self.between == "padding":
            x = torch.cat([x, x.new_zeros(len(x), input_ids.shape[1] - x.shape[1], 12)], 1)
        return x[order.argsort()]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Tensor:
        return self.last(self.read(input_ids, attention_mask))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("by_hand", "between"), [(False, ""), (True, ""), (True, "a function"), (True, "padding")]
)
def test_samples_sorted_for_a_recurrent_network(by_hand: bool, between: str, wide: bool) -> None:
    model, texts, tokens = RecurrentModel(by_hand, between).eval(), text_batches(4, samples=6), []
    for batch in texts:
        longest = int(batch["attention_mask"].sum(1).max())
        batch |= {} if wide else {key: value[:, :longest] for key, value in batch.items()}
        with torch.no_grad():
            tokens.append(
                model.read(**batch)[:, :longest][batch["attention_mask"][:, :longest] > 0]
            )
    result = run(model, iter(texts), lora(tau=1.0, target_modules=["last"]), method="gram")
    assert result.tokens == sum(map(len, tokens))
    check_shares(result, "last", torch.cat(tokens))


def test_label_mask_after_a_recurrent_network() -> None:
    """Labels of the first piece of each word, and none of the first and last token."""
    model = RecurrentModel(False, "").eval()
    texts = text_batches(4, samples=6, labels=True)
    tokens = []
    for batch in texts:
        length = batch["attention_mask"].sum(1, keepdim=True)
        place = torch.arange(batch["labels"].shape[1])
        batch["labels"][(place % 3 == 0) | (place == length - 1)] = -100
        labelled = batch["labels"][:, : int(length.max())] != -100
        with torch.no_grad():
            tokens.append(model.read(batch["input_ids"], batch["attention_mask"])[labelled])
    result = run(model, iter(texts), lora(tau=1.0, target_modules=["last"]), method="gram")
    assert result.tokens == sum(map(len, tokens))
    check_shares(result, "last", torch.cat(tokens))


def test_recurrent_network_with_sequence_first_layout() -> None:
    class SequenceFirst(RecurrentModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Tensor:
            return self.last(self.read(input_ids, attention_mask).transpose(0, 1))

    model, texts, tokens = SequenceFirst(False, "").eval(), text_batches(4, samples=6), []
    for batch in texts:
        kept = batch["attention_mask"][:, : int(batch["attention_mask"].sum(1).max())] > 0
        with torch.no_grad():
            tokens.append(model.read(**batch)[kept])
    result = run(model, iter(texts), lora(tau=1.0, target_modules=["last"]), method="gram")
    assert result.tokens == sum(map(len, tokens))
    check_shares(result, "last", torch.cat(tokens))

"""Batches that a model does not take, and errors of its own: explained, or passed through."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from eva_kernels import EvaTypeError, EvaValueError
from eva_peft.inputs.arguments import raise_if_not_taken
from integration.conftest import lora, make_bert, make_llama, run, text_batches, vectors

IDS = 3 + torch.arange(8).reshape(2, 4)
MASK = torch.ones(2, 4, dtype=torch.long)
TEXTS = text_batches(4)


def takes_text(input_ids: Tensor) -> None: ...


def test_errors_are_explained_where_forward_takes_no_name() -> None:
    own, model = KeyError("mine"), make_llama()
    with pytest.raises(EvaTypeError, match=r"names \['mine'\].*it failed with KeyError"):
        raise_if_not_taken({"mine": IDS}, {"mine": IDS}, model, own)
    plain: Any = nn.Module()
    plain.forward = takes_text
    known = EvaValueError("ours"), torch.OutOfMemoryError("full")
    for names, of, error in (
        (["mine", "input_ids"], model, own),
        ([], model, own),
        (["mine"], plain, own),
        *((["mine"], model, error) for error in known),
    ):
        batch = dict.fromkeys(names)
        raise_if_not_taken(batch, batch, of, error)  # the error may have another cause


def test_errors_are_explained_where_a_part_cannot_be_its_argument() -> None:
    pair = IDS, MASK, 2 * IDS, MASK, [0, 0]  # a preferred text, a rejected one, and more
    ids, named = IDS.tolist(), {"input_ids": IDS.tolist(), "attention_mask": MASK}
    lists = (ids, "list"), (named, "list"), (["one", "two"], "str"), ([object()] * 2, "object")
    lists += ((SimpleNamespace(to=lambda device: None), "SimpleNamespace"),)
    for batch, what in ((pair, "its values"), *((b, f"input_ids of type {t}") for b, t in lists)):
        with pytest.raises(EvaTypeError, match=rf"batch with {what} .*it failed with .*forward_fn"):
            run(make_llama(), iter([batch]), lora(target_modules=["q_proj"]))
    texts, raised = (IDS, MASK), IndexError("index out of range")
    raise_if_not_taken(texts, {}, make_llama(), raised)  # they can be: it has another cause


@pytest.mark.filterwarnings("ignore:an attention_mask of shape:eva_kernels.EvaWarning")
def test_errors_are_explained_where_the_mask_does_not_fit_the_token_ids() -> None:
    padded: Any = (MASK.cumsum(1) < 4).long()
    for mask, what in (
        (padded[:, None], r"shape \(2, 1, 4\)"),
        (padded[:, 1:], r"shape \(2, 3\)"),
        (padded.tolist(), "type list"),
    ):
        message = rf"an attention_mask of {what}, for input_ids of shape \(2, 4\) .*it failed with"
        with pytest.raises(EvaTypeError, match=message):
            run(make_llama(), [{"input_ids": IDS, "attention_mask": mask}], lora())
    by_codebook = {"input_ids": IDS[..., None].expand(2, 4, 3), "attention_mask": MASK}
    raise_if_not_taken(by_codebook, by_codebook, make_llama(), IndexError("of another cause"))


def test_errors_are_explained_where_a_decoder_gets_no_inputs() -> None:
    size = {"vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    model = T5ForConditionalGeneration(T5Config(**size, num_heads=2, decoder_start_token_id=0))
    text = {"input_ids": IDS, "attention_mask": MASK}
    for batch in (text, IDS, (IDS, MASK)):
        with pytest.raises(
            EvaTypeError, match=r"with no labels or decoder inputs .*it failed with"
        ):
            run(model, iter([batch]), lora(target_modules=["q"]))
    error = ValueError("You must specify exactly one of input_ids or inputs_embeds")
    for more in ("labels", "decoder_input_ids"):  # then it has another cause
        raise_if_not_taken(text, {**text, more: IDS}, model, error)
    raise_if_not_taken(text, text, model, IndexError("index out of range"))
    raise_if_not_taken(text, text, make_llama(), error)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_nested_tensors_are_refused_with_the_remedy(layout: torch.layout) -> None:
    ids = torch.nested.nested_tensor([IDS[0], IDS[1, :2]], layout=layout)
    for batch in (ids, (ids, IDS), {"input_ids": ids, "labels": ids}):
        with pytest.raises(EvaTypeError, match=r"nested tensors.*to_padded_tensor.*attention_mask"):
            run(make_llama(), iter([batch]), lora(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        ((torch.arange(2), IDS, MASK), "2,"),  # an index comes first
        ((torch.arange(2), IDS), "2,"),
        (list(IDS), "4,"),  # samples
        (IDS[:, None], "2, 1, 4"),
        ((IDS[:, None], torch.ones(2)), "2, 1, 4"),
    ],
)
def test_unnamed_parts_that_cannot_be_token_ids_are_refused(batch: Any, shape: str) -> None:
    with pytest.raises(EvaValueError, match=rf"has input_ids of shape \({shape}\).*let the"):
        run(make_llama(), [batch], lora(target_modules=["q_proj"]))


def test_images_of_different_sizes_are_refused() -> None:
    images = [torch.randn(3, 8, width) for width in (8, 9, 12)]
    model, config = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), lora(target_modules=["0"])
    with pytest.raises(EvaTypeError, match=r"images of different sizes.*forward_fn"):
        run(model, [images], config)
    run(model, [(torch.stack(images[:1] * 3), torch.zeros(3, 2, 5))] * 2, config)  # and boxes
    of_rows = nn.Sequential(nn.Unflatten(2, (4, 2)), nn.Conv2d(3, 4, 1))  # makes images of them
    run(of_rows, [(torch.randn(3, 3, 8), torch.zeros(3))] * 2, lora(target_modules=["1"]))


def test_token_types_in_the_place_of_the_mask_are_refused() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    types = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    config = lora(target_modules=["query"])
    for others in ((types, mask), (0 * types, mask), (types > 0, mask, MASK[:, 0])):
        with pytest.raises(EvaValueError, match="the model takes the mask first; let the loader"):
            run(make_bert(), [(IDS, *others)], config)
    for others in ((mask, types), (mask, 0 * types)):
        run(make_bert(), [(IDS, *others)] * 2, config)


class AnyKeyword(LlamaForCausalLM):
    """Its ``forward`` does not declare all names that it takes."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(make_llama().config)
        self.error = error

    def forward(self, flag: bool = False, **inputs: Any) -> Any:
        raise self.error or AssertionError


class Decorated(AnyKeyword):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error or AssertionError


def test_errors_of_models_that_pass_on_any_keyword() -> None:
    config = lora(target_modules=["q_proj"])
    full = torch.OutOfMemoryError("CUDA out of memory")
    for kind in (AnyKeyword, Decorated):
        with pytest.raises(torch.OutOfMemoryError, match="out of memory on cpu"):
            run(kind(full), TEXTS, config)
    with pytest.raises(KeyError, match="mine"):
        run(Decorated(KeyError("mine")), TEXTS, config)
    with pytest.raises(TypeError, match=r"names .*\(it failed with KeyError\('mine'\)\). Let"):
        run(AnyKeyword(KeyError("mine")), TEXTS, config)


class FailsLater(AnyKeyword):
    """Passes any keyword on, and fails after its first run."""

    def forward(self, flag: bool = False, **inputs: Any) -> Any:
        error, self.error = self.error, KeyError("mine")
        return LlamaForCausalLM.forward(self, **inputs) if error is None else super().forward()


def test_names_accepted_once_are_not_blamed_later() -> None:
    with pytest.raises(KeyError, match="mine"):
        run(FailsLater(None), TEXTS, lora(target_modules=["q_proj"]))


def test_uncollated_token_ids_are_an_error() -> None:
    with pytest.raises((IndexError, TypeError, ValueError, RuntimeError)):
        run(make_llama(), iter([list(torch.arange(24).reshape(3, 8) + 1)]), lora())


def test_batches_that_forward_does_not_take_are_errors() -> None:
    class OfTwo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(20, 4)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.lin(sample)

    model, config = OfTwo(), lora(target_modules=["lin"])
    for batch, message in (
        ({"pixel_values": vectors()[0]}, "pixel_v"),
        (vectors()[0], "its values"),
    ):
        with pytest.raises(EvaTypeError, match=rf"OfTwo\.forward\(.*{message}.*pass forward_fn"):
            run(model, iter([batch]), config)
    assert not model.lin._forward_pre_hooks


@pytest.mark.parametrize("calls_method", [False, True])
def test_mapping_for_a_single_tensor_model_is_explained(calls_method: bool) -> None:
    class OfOneTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.lin = nn.Embedding(9, 20), nn.Linear(20, 4)

        def forward(self, idx: Tensor) -> Tensor:
            return self.lin(self.words(idx.flatten() if calls_method else idx))

    message = r"OfOneTensor.*not take.* names \['input_ids', 'labels'\].*dict.*pass forward_fn"
    with pytest.raises(EvaTypeError, match=message):
        run(OfOneTensor(), [{"input_ids": IDS, "labels": IDS}], lora())


def test_type_error_raised_inside_the_model_passes_through() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(20, 4)

        def forward(self, sample: Any) -> Tensor:
            sample = sample["x"] if isinstance(sample, dict) else sample
            return self.lin(sample + "a word")

    for batch in (vectors()[0], {"sample": vectors()[0]}, {"x": vectors()[0]}):
        with pytest.raises(TypeError, match=r"^unsupported operand"):
            run(Wrong(), iter([batch]), lora(target_modules=["lin"]))


@pytest.mark.parametrize("later", [False, True])
def test_error_not_caused_by_the_mapping_passes_through(later: bool) -> None:
    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(20, 4)

        def forward(self, sample: Any) -> Tensor:
            return self.lin(torch.tanh(sample["x"]), **{} if later else {"return_dict": True})

    batches = [{"x": x} for x in vectors(2)]
    with pytest.raises(TypeError, match="must be Tensor, not dict$" if later else "'return_dict'$"):
        run(Passing(), [*batches, {"x": batches[0]}], lora(target_modules=["lin"]))


def test_batch_of_only_strings_and_labels_is_explained() -> None:
    batch = {"prompt": ["a", "b"], "labels": torch.ones(2, 9).long()}
    with pytest.raises(EvaTypeError, match=r"Llama.* not take .*names \['labels', 'prompt'\]"):
        run(make_llama(), [batch], lora())

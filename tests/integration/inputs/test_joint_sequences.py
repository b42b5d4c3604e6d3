"""Images, or their latents, and their prompts in one sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration.conftest import layer_inputs, lora, lost, run

pytestmark = pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")

EXACT: dict[str, Any] = {"method": "gram", "max_steps": 4}
TEXT = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
PIXELS = torch.arange(9) < torch.tensor([6, 9, 4])[:, None]
WHOLE = torch.ones(3, 9, dtype=torch.bool)


class Block(nn.Module):
    """Reads pixels, text, and both in one sequence."""

    def __init__(self, text_first: bool) -> None:
        super().__init__()
        self.text_first = text_first
        self.to_q, self.add_k_proj, self.proj_mlp = (nn.Linear(16, 16) for _ in range(3))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        pixels = hidden_states + self.to_q(hidden_states)
        text = encoder_hidden_states + self.add_k_proj(encoder_hidden_states)
        both, sizes = [pixels, text], [pixels.shape[1], text.shape[1]]
        if self.text_first:
            both, sizes = both[::-1], sizes[::-1]
        joint = torch.cat(both, 1)
        parts = (joint + self.proj_mlp(joint)).split(sizes, 1)
        return (parts[1], parts[0]) if self.text_first else (parts[0], parts[1])


class ImageModel(nn.Module):
    """Passes its blocks one mask; ``covers`` says of which inputs."""

    def __init__(self, covers: str, text_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.covers, self.text_first = covers, text_first
        self.blocks = nn.ModuleList(Block(text_first) for _ in range(2))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixels_mask: Tensor | None = None,
    ) -> Tensor:
        mask = encoder_attention_mask if attention_mask is None else attention_mask
        assert mask is not None
        if self.covers == "both":
            pixels = torch.ones(hidden_states.shape[:2], dtype=torch.bool)
            pixels = pixels if pixels_mask is None else pixels_mask
            mask = joint([pixels, mask], self.text_first)[:, None, None]
        pixels, text = hidden_states, encoder_hidden_states
        for block in self.blocks:
            pixels, text = block(pixels, text, mask)
        return pixels


def joint(masks: list[Tensor], text_first: bool) -> Tensor:
    return torch.cat(masks[::-1] if text_first else masks, 1)


def batches(pixels: int = 9, **masks: Tensor) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "hidden_states": torch.randn(3, pixels, 16, generator=generator),
            "encoder_hidden_states": torch.randn(3, 7, 16, generator=generator).cumsum(1),
            **masks,
        }
        for _ in range(4)
    ]


def check(model: nn.Module, data: list[dict[str, Tensor]], kept: dict[str, Tensor]) -> None:
    names = [f"blocks.{i}.{name}" for i in range(2) for name in kept]
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names, masked=False).items():
        rows = x[kept[name.split(".")[-1]].flatten().repeat(4)]
        assert lost(result.components[name], rows) < 1e-6, name


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded pixels", "padded pixels"])
@pytest.mark.parametrize("text_first", [False, True], ids=["text last", "text first"])
def test_joint_mask_passed_to_blocks_applies(text_first: bool, padded: bool) -> None:
    pixels = PIXELS if padded else WHOLE
    masks = {"encoder_attention_mask": TEXT.long()}
    data = batches(**masks, **({"pixels_mask": PIXELS} if padded else {}))
    kept = {"to_q": pixels, "add_k_proj": TEXT, "proj_mlp": joint([pixels, TEXT], text_first)}
    check(ImageModel("both", text_first), data, kept)


@pytest.mark.parametrize("text_first", [False, True], ids=["text last", "text first"])
@pytest.mark.parametrize("pixels", [7, 2, 1])
def test_joint_mask_with_at_most_as_many_pixels_as_text_tokens(
    pixels: int, text_first: bool
) -> None:
    whole = torch.ones(3, pixels, dtype=torch.bool)
    mask = joint([whole, TEXT], text_first)
    kept = {"to_q": whole, "add_k_proj": TEXT, "proj_mlp": mask}
    check(ImageModel("both", text_first), batches(pixels, encoder_attention_mask=TEXT), kept)
    check(ImageModel("mask", text_first), batches(pixels, attention_mask=mask), kept)


@pytest.mark.parametrize("text_first", [False, True], ids=["text last", "text first"])
def test_joint_mask_in_the_batch_applies(text_first: bool) -> None:
    mask = joint([WHOLE, TEXT], text_first)
    kept = {"to_q": WHOLE, "add_k_proj": TEXT, "proj_mlp": mask}
    check(ImageModel("mask", text_first), batches(attention_mask=mask), kept)


@pytest.mark.parametrize("covers", ["both", "mask"], ids=["blocks", "batch"])
@pytest.mark.parametrize("text_first", [False, True], ids=["text last", "text first"])
def test_joint_mask_of_left_padded_text_applies(text_first: bool, covers: str) -> None:
    text = TEXT.flip(1)
    mask = joint([WHOLE, text], text_first)
    kept = {"to_q": WHOLE, "add_k_proj": text, "proj_mlp": mask}
    masks = {"encoder_attention_mask": text} if covers == "both" else {"attention_mask": mask}
    check(ImageModel(covers, text_first), batches(**masks), kept)


def test_mask_of_two_merged_prompts_applies() -> None:
    """Prompts of two encoders, sorted so that the unpadded tokens of both come first."""
    second = torch.arange(5) < torch.tensor([2, 5, 1])[:, None]
    order = torch.cat([TEXT, second], 1).long().argsort(dim=1, descending=True, stable=True)
    both = torch.cat([TEXT, second], 1).gather(1, order)

    class TwoTexts(ImageModel):
        def __init__(self) -> None:
            super().__init__("text")
            self.context_embedder_2 = nn.Linear(16, 16)

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **more: Any) -> Any:  # type: ignore[override]
            text = self.context_embedder_2(more["encoder_hidden_states_2"])
            text = torch.cat([encoder_hidden_states, text], 1)
            text = text.gather(1, order[:, :, None].expand_as(text))
            return super().forward(hidden_states, text, both)

    masks = {"encoder_attention_mask": TEXT, "encoder_attention_mask_2": second}
    data = batches(**masks)
    for batch in data:
        batch["encoder_hidden_states_2"] = torch.randn(3, 5, 16).cumsum(1)
    model = TwoTexts()
    check(model, data, {"to_q": WHOLE, "add_k_proj": both})
    found = run(model, data, lora(tau=1.0, target_modules=["context_embedder_2"]), **EXACT)
    rows = torch.cat([b["encoder_hidden_states_2"][second] for b in data]).double()
    assert lost(found.components["context_embedder_2"], rows) < 1e-6


def test_layer_with_several_rows_per_token_is_masked() -> None:
    class LayerFusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.text_fusion = nn.Linear(8, 4)

        def forward(
            self, hidden_states: Tensor, encoder_hidden_states: Tensor, **mask: Tensor
        ) -> Tensor:
            return self.text_fusion(encoder_hidden_states.reshape(-1, 2, 8))  # states of two layers

    data = batches(encoder_attention_mask=TEXT)
    result = run(LayerFusion(), data, lora(tau=1.0, target_modules=["text_fusion"]), **EXACT)
    rows = torch.cat([b["encoder_hidden_states"][TEXT].reshape(-1, 8) for b in data])
    assert lost(result.components["text_fusion"], rows.double()) < 1e-6
    assert result.tokens == len(rows)


def test_layer_behind_sequence_first_parts_is_masked() -> None:
    """The model receives text lengths, its parts a joint mask."""

    class Part(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return 2 * x

    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.part, self.final = Part(), nn.Linear(16, 4)

        def forward(self, hidden_states: Tensor, text: Tensor, text_lens: Tensor) -> Tensor:
            kept = torch.arange(text.shape[1]) < text_lens[:, None]
            mask = joint([torch.ones(hidden_states.shape[:2], dtype=torch.bool), kept], False)
            both = torch.cat([hidden_states, text], 1).transpose(0, 1)
            return self.final(self.part(both, attention_mask=mask[:, None, None]))

    data = batches(text_lens=TEXT.sum(1))
    for batch in data:
        batch["text"] = batch.pop("encoder_hidden_states")
    model = Lengths()
    result = run(model, data, lora(tau=1.0, target_modules=["final"]), **EXACT)
    rows = layer_inputs(model, data, ["final"], masked=False)["final"]
    kept = joint([WHOLE, TEXT], False).T.flatten().repeat(4)
    assert lost(result.components["final"], rows[kept]) < 1e-6

"""Models that users write after tutorials, with the masks of these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from integration.conftest import VOCABULARY, layer_inputs, lora, lost, run
from integration.inputs.padding_blocks import EXACT, KEPT, batches


def test_masks_apply_where_forward_of_parts_is_called_directly() -> None:
    """As in codertimo's BERT, and BERT4Rec after it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(16, 16)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.last(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.block, self.head = nn.Embedding(VOCABULARY, 16), Block(), Block()

        def forward(self, ids: Tensor) -> Tensor:
            mask = (ids > 0)[:, None].repeat(1, ids.shape[1], 1)[:, None]
            return self.head.last(self.block.forward(self.words(ids), mask))

    data, names = batches(), ["block.last", "head.last"]
    model = Model().eval()
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names).items():
        assert lost(result.components[name], x[KEPT.flatten().repeat(4)]) < 1e-6, name
    assert not any("forward" in vars(part) for part in model.modules())


def test_mask_with_an_axis_of_features_applies() -> None:
    """(B, N, 1), as in Deep Sets: it is multiplied with the features."""

    class DeepSet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.phi, self.rho = nn.Linear(16, 16), nn.Linear(16, 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.rho((self.phi(x) * mask).sum(1))

    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(3, 7, 16, generator=generator) for _ in range(4)]
    for dtype in (torch.bool, torch.float32):
        data = [(x, KEPT[..., None].to(dtype)) for x in sets]
        result = run(DeepSet(), data, lora(tau=1.0, target_modules=["phi"]), **EXACT)
        assert lost(result.components["phi"], torch.cat([x[KEPT] for x in sets]).double()) < 1e-6

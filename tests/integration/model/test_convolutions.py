"""Convolutions: patches are the tokens, for every geometry, and adapters train and reload."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import _ConvNd as LoraConvolution
from torch import Tensor, nn

import eva_kernels
from eva_kernels import EvaValueError, EvaWarning
from eva_peft.model import layers as layers_module
from integration.conftest import (
    QUIET,
    angle,
    check_shares,
    exact_pca,
    lora,
    lora_layers,
    lost,
    output_of,
    perturb_b,
    run,
    same_state,
    state_of,
    vectors,
    wrapped,
)

GEOMETRIES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(3, 8, 3),
    "1x1": lambda: nn.Conv2d(3, 8, 1),
    "padded": lambda: nn.Conv2d(3, 8, (3, 5), padding=(1, 2)),
    "strided": lambda: nn.Conv2d(3, 8, (2, 3), stride=(2, 1), padding=(0, 1)),
    "dilated": lambda: nn.Conv2d(3, 8, 3, padding=2, dilation=(2, 1)),
    "same, odd span": lambda: nn.Conv2d(3, 8, (4, 2), padding="same", dilation=(1, 3)),
    "valid": lambda: nn.Conv2d(3, 8, 3, padding="valid"),
    "patch embedding": lambda: nn.Conv2d(3, 8, 4, stride=4),
    "1-d": lambda: nn.Conv1d(3, 8, 3, padding=2, dilation=2),
    "3-d": lambda: nn.Conv3d(3, 8, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 0)),
}
SPACE = {nn.Conv1d: (20,), nn.Conv2d: (10, 9), nn.Conv3d: (4, 6, 5)}


@pytest.fixture(autouse=True)
def unpatched_peft() -> Iterator[None]:
    """Start with PEFT's own method, which tests of other files may have patched."""
    before = LoraConvolution.update_layer
    LoraConvolution.update_layer = inspect.unwrap(before)
    yield
    LoraConvolution.update_layer = before


def images(space: tuple[int, ...] = (10, 9), channels: int = 3, count: int = 5) -> list[Tensor]:
    """Return batches whose channels differ in scale and whose neighbours are correlated."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count * 4, channels, *space, generator=generator)
    smooth = noise.cumsum(-1) + 0.5
    scale = 0.6 ** torch.arange(channels).reshape(channels, *[1] * len(space))
    return list((smooth * scale).split(4))


def patches_by_basis(conv: nn.Module, x: Tensor) -> Tensor:
    """Return the patches, (N, D), as the output of a convolution with unit kernels."""
    kind: Any = type(conv)
    d = conv.in_channels * torch.Size(conv.kernel_size).numel()
    settings = {name: getattr(conv, name) for name in ("stride", "padding", "dilation")}
    if conv.padding == "same":  # PEFT's lora_A ignores the dilation there
        settings["dilation"] = 1
    unit = kind(conv.in_channels, d, conv.kernel_size, bias=False, **settings).double()
    with torch.no_grad():
        unit.weight.copy_(torch.eye(d).reshape(unit.weight.shape))
        return unit(x.double()).movedim(1, -1).reshape(-1, d)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch
@pytest.mark.parametrize("name", GEOMETRIES)
def test_components_equal_the_exact_ones_of_patches(name: str) -> None:
    torch.manual_seed(7)
    conv = GEOMETRIES[name]()
    data = images(SPACE[type(conv)])
    result = run(
        nn.Sequential(conv), iter(data), lora(target_modules=["0"], tau=1.0), method="gram"
    )
    patches = torch.cat([patches_by_basis(conv, x) for x in data])
    assert result.in_features == {"0": patches.shape[1]}
    assert result.tokens == len(patches)
    check_shares(result, "0", patches)
    assert lost(result.components["0"], patches) < 1e-6


def test_patches_are_extracted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, data = nn.Conv2d(3, 8, 3, padding=1), images()
    config = lora(target_modules=["0"], tau=1.0)
    whole = run(nn.Sequential(conv), iter(data), config, method="gram")
    sizes = []
    original = eva_kernels.streaming.InputStream.add

    def add(self: Any, x: Tensor, rows: Tensor | None = None) -> int:
        sizes.append(len(x))
        return original(self, x, rows)

    monkeypatch.setattr(eva_kernels.streaming.InputStream, "add", add)
    monkeypatch.setattr(layers_module, "MAX_PATCH_BYTES", 27 * 90 * 4)  # one sample
    parts = run(nn.Sequential(conv), iter(data), config, method="gram")
    assert set(sizes) == {90}
    assert angle(parts.components["0"][:4], whole.components["0"][:4]) < 1e-4


class Net(nn.Module):
    """Plain, grouped, dilated and 1-d rectangular kernels, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4)
        self.dilated = nn.Conv2d(12, 16, 3, padding=2, dilation=2)
        self.flat = nn.Conv2d(16, 16, (1, 3), padding=(0, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.grouped, self.dilated, self.flat):
            x = torch.tanh(layer(x))
        return self.head(x.mean((2, 3)))


NAMES = ["stem", "grouped", "dilated", "flat", "head"]


def initialized_net(**options: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups > 1. Merging", category=UserWarning)
        with pytest.warns(EvaWarning, match=r"ignores the dilation .*\(dilated\).*patch_peft"):
            return eva_kernels.initialize(
                Net(), images(), lora(target_modules=NAMES), max_steps=4, **{**QUIET, **options}
            )


def test_convolutional_network_trains_and_reloads(tmp_path: Any) -> None:
    base = Net()
    x = images()[0]
    before, weights = output_of(base, x), state_of(base)
    model = initialized_net()
    torch.testing.assert_close(output_of(model, x), before)
    found = lora_layers(model)
    assert set(found) == set(NAMES)
    assert sum(model.eva_result.ranks.values()) <= 4 * len(NAMES)
    for name, layer in found.items():
        a = layer.lora_A["default"].weight.flatten(1)
        assert len(a) == model.eva_result.ranks[name]
        torch.testing.assert_close(a @ a.mT, torch.eye(len(a)), atol=3e-6, rtol=0)
    model(x).square().mean().backward()
    for name, layer in found.items():
        assert layer.lora_B["default"].weight.grad.any(), name
    perturb_b(model)
    expected = output_of(model, x)
    assert not torch.allclose(expected, before)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups > 1. Merging", category=UserWarning)
        again = PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(output_of(again, x), expected)
    assert same_state(weights, state_of(again.unload()))


def test_groups_get_equal_shares_of_the_components() -> None:
    torch.manual_seed(7)
    base = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4))
    config = lora(r=8, rho=1.0, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups > 1. Merging", category=UserWarning)
        model = eva_kernels.initialize(base, images(channels=8), config, max_steps=4, **QUIET)
    assert model.eva_result.ranks == {"0": 8}
    a = lora_layers(model)["0"].lora_A["default"].weight.flatten(1)
    components = model.eva_result.components["0"]
    for group in range(4):  # two rows per group
        torch.testing.assert_close(a[2 * group : 2 * group + 2], components[[group, group + 4]])


@pytest.mark.parametrize("budget", ["rank", "params"])
@pytest.mark.parametrize("r", [4, 8])
def test_ranks_are_multiples_of_the_groups(budget: str, r: int) -> None:
    result = run(
        Net(), images(), lora(r=r, rho=1.5, target_modules=NAMES), max_steps=2, budget=budget
    )
    assert result.ranks["grouped"] % 4 == 0
    outputs = {"stem": 8, "grouped": 12, "dilated": 16, "flat": 16, "head": 5}
    price = dict.fromkeys(NAMES, 1)
    if budget == "params":
        price = {n: result.in_features[n] + outputs[n] for n in NAMES}
    spent = sum(result.ranks[n] * price[n] for n in NAMES)
    assert spent <= r * sum(price.values())
    fewer = result.reallocated(r=4, min_rank=1)
    assert fewer.ranks["grouped"] in (4, 8)
    assert sum(fewer.ranks.values()) <= 4 * len(NAMES)
    with pytest.raises(
        EvaValueError, match=r"layer grouped: r=3 is not a multiple of the 4 groups"
    ):
        result.reallocated(r=3)


def test_rank_that_the_groups_do_not_divide_is_rejected() -> None:
    with pytest.raises(EvaValueError, match=r"layer grouped: .*4 groups.*r is 6.*rank_pattern"):
        run(Net(), images(), lora(r=6, target_modules=NAMES))
    result = run(Net(), images(), lora(target_modules=["grouped"]), max_steps=2)
    state = result.state_dict()
    model = wrapped_quietly(Net(), lora(target_modules=["grouped"], init_lora_weights=True))
    before = state_of(model)
    model.peft_config["default"].init_lora_weights = "eva"
    for rows, message in (
        (state["grouped"][:3], "layer grouped: rank 3 is not a multiple of the 4 groups"),
        (
            state["grouped"][:, :9],
            "layer grouped: the rows in the state dict have 9 features, but the layer reads 72",
        ),
    ):
        with pytest.raises(EvaValueError, match=message):
            eva_kernels.initialize_lora_eva_weights(model, eva_state_dict={"grouped": rows})
    assert same_state(before, state_of(model))


def wrapped_quietly(base: nn.Module, config: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups > 1. Merging", category=UserWarning)
        return wrapped(base, config)


def test_adapter_made_by_peft_gets_its_dilation() -> None:
    model = wrapped_quietly(Net(), lora(target_modules=NAMES, init_lora_weights=True))
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(images()[0])  # PEFT's adapter of a dilated convolution fails
    with pytest.warns(EvaWarning, match="ignores the dilation"):
        eva_kernels.initialize(model, images(), allow_any_init=True, max_steps=3, **QUIET)
    torch.testing.assert_close(output_of(model, images()[0]), output_of(Net(), images()[0]))


def test_patch_peft_fixes_dilation() -> None:
    eva_kernels.patch_peft().__exit__(None, None, None)
    model = wrapped_quietly(Net(), lora(target_modules=NAMES, init_lora_weights=True))
    torch.testing.assert_close(output_of(model, images()[0]), output_of(Net(), images()[0]))


def test_kernels_of_equal_geometry_share_an_input() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
            self.c = nn.Conv2d(3, 4, 3, padding=2, dilation=2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x), self.c(x)], 1)

    data = images()
    config = lora(target_modules=["a", "b", "c"], tau=1.0)
    result = run(Branches(), iter(data), config, method="gram")
    assert result.shared_inputs == [["a", "b"]]
    alone = run(Branches(), iter(data), lora(target_modules=["c"], tau=1.0), method="gram")
    assert angle(result.components["c"][:3], alone.components["c"][:3]) < 1e-5


def test_text_convolution_omits_padding() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.embed, self.conv = nn.Embedding(50, 6), nn.Conv1d(6, 5, 3, padding=1)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.conv(self.embed(input_ids).mT)

    model, ids = Text(), torch.randint(0, 50, (4, 12))
    mask = (torch.arange(12) < torch.tensor([12, 9, 7, 4])[:, None]).long()
    config = lora(target_modules=["conv"], tau=1.0)
    batch = {"input_ids": ids, "attention_mask": mask}
    result = run(model, iter([batch]), config, method="gram", trim_padding=False)
    with torch.no_grad():
        patches = patches_by_basis(model.conv, model.embed(ids).mT)[mask.flatten().bool()]
    assert result.tokens == len(patches) == 32
    assert angle(result.components["conv"][:4], exact_pca(patches)[1][:4]) < 1e-3


def test_transposed_convolutions_keep_the_default() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 3, 1))
    with pytest.warns(EvaWarning, match="linear layers and convolutions; .*initialisation: 0"):
        result = run(model, images(), lora(target_modules=["0", "1"]), max_steps=2)
    assert list(result.ranks) == ["1"]


class Parallel(nn.Module):
    """A layer with the attributes of Megatron's, for which PEFT has a custom mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.input_size, self.output_size = 20, 20
        self.weight = nn.Parameter(torch.eye(20))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


@pytest.mark.parametrize("prepared", [True, False])
def test_custom_modules_of_peft_keep_the_default(prepared: bool) -> None:
    model = nn.Sequential(Parallel(), nn.Linear(20, 4))
    config = lora(target_modules=["0", "1"])
    config._register_custom_module({Parallel: LoraLinear})
    given = wrapped(model, config) if prepared else model
    message = "linear layers and convolutions; .*initialisation: 0"
    with pytest.warns(EvaWarning, match=message) as warned:
        done = eva_kernels.initialize(given, vectors(), config, max_steps=3, **QUIET)
    assert len(warned) == 1  # though targets are also found before the pass
    assert list(done.eva_result.ranks) == ["1"]
    first = lora_layers(done)["0"].lora_A["default"].weight
    assert not torch.allclose(first @ first.mT, torch.eye(4), atol=1e-3)


def test_inputs_of_wrong_shape_are_rejected() -> None:
    class Flat(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(-1, 3, 4, 4))

    model = nn.Sequential(Flat(3, 4, 2))
    message = r"layer 0, step 1: expected .* of 12 features, or .*\(samples, 3, space, space\)"
    with pytest.raises(EvaValueError, match=message):
        run(model, [torch.randn(2, 48)], lora(target_modules=["0"]))
    single = nn.Sequential(copy.deepcopy(GEOMETRIES["plain"]()))
    result = run(single, [x[0] for x in images()], lora(target_modules=["0"]), max_steps=3)
    assert result.tokens == 3 * 8 * 7  # an image without a batch dimension

"""``pad_ranks``: one rank for all layers of a saved adapter, with unchanged outputs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import eva_kernels
from eva_kernels import EvaValueError, pad_ranks
from integration.command.running import reason, run

NOISE = torch.Generator()


def llama() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=4, **size)).eval()


class Convolutions(nn.Module):
    """Grouped convolutions, whose rows of lora_A belong to groups, and other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 8)
        self.conv = nn.Conv1d(8, 12, 3, groups=2, padding=1)
        self.next = nn.Conv1d(12, 12, 1, groups=3)
        self.out = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        mixed: Tensor = self.next(self.conv(self.words(ids).mT)).mT
        return torch.as_tensor(self.out(mixed.tanh()))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions().eval()


def with_random_adapter(model: nn.Module, **fields: Any) -> PeftModel:
    """Wrap a model, and make no tensor of the adapter zero."""
    tuned = get_peft_model(model, LoraConfig(**fields)).eval()
    NOISE.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=NOISE)
    return tuned


def outputs(model: nn.Module) -> Tensor:
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        found = model(ids)
    return torch.as_tensor(getattr(found, "logits", found))


def ranks_of(folder: Path) -> set[int]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {len(value) for key, value in tensors.items() if re.search(r"lora_(embedding_)?A", key)}


def dtypes_of(folder: Path) -> dict[str, torch.dtype]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: value.dtype for key, value in tensors.items()}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


@pytest.fixture(scope="module")
def eva(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an adapter with ranks from EVA, one layer removed, and random lora_B."""
    torch.manual_seed(3)
    loader = [{"input_ids": torch.randint(64, (4, 16))} for _ in range(3)]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights="eva",
        target_modules="all-linear",
        eva_config=EvaConfig(rho=2.0, tau=0.0),
    )
    result = eva_kernels.calibrate(llama(), loader, config, progress=False)
    rows = result.state_dict()
    without = min(rows, key=lambda name: len(rows[name]))
    result.ranks[without] = 0
    tuned = result.apply(llama(), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("eva")
    tuned.save_pretrained(folder)
    return folder


def test_padded_eva_adapter_has_the_same_outputs(eva: Path, tmp_path: Path) -> None:
    ranks = ranks_of(eva)
    assert len(ranks) > 2
    before = {path.name: path.read_bytes() for path in eva.iterdir()}
    assert pad_ranks(eva, tmp_path) == max(ranks)
    assert ranks_of(tmp_path) == {max(ranks)}
    config = config_of(tmp_path)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    # EVA keeps the scaling of every layer, so a runtime without patterns scales correctly
    assert config["lora_alpha"] / config["r"] == 6 / 4
    expected = outputs(PeftModel.from_pretrained(llama(), eva).eval())
    padded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(outputs(padded), expected)
    assert (expected - outputs(llama())).abs().max() > 0.01
    assert before == {path.name: path.read_bytes() for path in eva.iterdir()}


def test_original_values_are_kept_bitwise(eva: Path, tmp_path: Path) -> None:
    pad_ranks(eva, tmp_path)
    old = load_file(eva / "adapter_model.safetensors")
    new = load_file(tmp_path / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    for key, value in old.items():
        rows, columns = value.shape
        assert torch.equal(new[key][:rows, :columns], value)
        assert new[key].count_nonzero() == value.count_nonzero()


@pytest.mark.filterwarnings("ignore:.*the targeted layer of type Linear has no bias")
@pytest.mark.filterwarnings("ignore:.*tensor.s. have invalid shape.*bias")  # a bug of PEFT
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"alpha_pattern": {"v_proj": 3, "down_proj": 20}}, id="scaling"),
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param({"init_lora_weights": "orthogonal"}, id="orthogonal"),
        pytest.param({"use_dora": True}, id="dora"),
        pytest.param({"lora_bias": True, "alpha_pattern": {"o_proj": 3}}, id="bias"),
        pytest.param({"modules_to_save": ["lm_head"]}, id="saved"),
    ],
)
def test_padded_variants_have_the_same_outputs(fields: dict[str, Any], tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    ranks = {"q_proj": 8, "layers.1.self_attn.v_proj": 2}
    tuned = with_random_adapter(
        llama(), r=4, lora_alpha=8, target_modules=targets, rank_pattern=ranks, **fields
    )
    tuned.save_pretrained(tmp_path / "old")
    assert pad_ranks(tmp_path / "old", tmp_path / "new") == 8
    assert ranks_of(tmp_path / "new") == {8}
    assert not config_of(tmp_path / "new")["use_rslora"]
    assert dtypes_of(tmp_path / "new") == dtypes_of(tmp_path / "old")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "new").eval()
    assert {
        s for m in loaded.modules() if isinstance(m, LoraLayer) for s in m.scaling.values()
    } == {config_of(tmp_path / "new")["lora_alpha"] / 8}
    torch.testing.assert_close(outputs(loaded), outputs(tuned))
    assert pad_ranks(tmp_path / "old", tmp_path / "odd", r=9) == 9
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "odd").eval()
    torch.testing.assert_close(outputs(loaded), outputs(tuned))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_grouped_convolutions_and_embeddings_are_padded(tmp_path: Path) -> None:
    ranks = {"words": 2, "conv": 4, "out": 5}
    tuned = with_random_adapter(
        convolutions(), r=3, lora_alpha=3, target_modules=[*ranks, "next"], rank_pattern=ranks
    )
    tuned.save_pretrained(tmp_path / "old")
    assert (
        pad_ranks(tmp_path / "old", tmp_path / "new") == 6
    )  # at least 5, and a multiple of the groups
    assert ranks_of(tmp_path / "new") == {6}
    loaded = PeftModel.from_pretrained(convolutions(), tmp_path / "new").eval()
    torch.testing.assert_close(outputs(loaded), outputs(tuned))
    with pytest.raises(
        EvaValueError, match="r=8 is not a multiple of 6, which the groups of the convolutions"
    ):
        pad_ranks(tmp_path / "old", tmp_path / "odd", r=8)


class Attention(nn.Module):
    """PEFT saves its output projection under a name that no pattern matches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(64, 6), nn.Linear(6, 5)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return torch.as_tensor(self.out(self.attention(x, x, x)[0]))


def test_both_projections_of_an_attention_are_padded(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"rank_pattern": {"attention": 3}, "alpha_pattern": {"attention": 8}}
    tuned = with_random_adapter(
        Attention(), r=2, lora_alpha=3, target_modules=["attention", "out"], **fields
    )
    tuned.save_pretrained(tmp_path / "old")
    assert pad_ranks(tmp_path / "old", tmp_path / "new") == 3
    assert ranks_of(tmp_path / "new") == {3}
    loaded = PeftModel.from_pretrained(Attention(), tmp_path / "new").eval()
    torch.testing.assert_close(outputs(loaded), outputs(tuned))
    assert (outputs(tuned) - outputs(Attention().eval())).abs().max() > 0.01


def test_rank_may_be_larger_but_not_smaller(eva: Path, tmp_path: Path) -> None:
    largest = max(ranks_of(eva))
    assert pad_ranks(eva, tmp_path / "more", r=largest + 3) == largest + 3
    assert ranks_of(tmp_path / "more") == {largest + 3}
    message = f"r={largest - 1} is less than {largest}, the largest rank of a layer"
    with pytest.raises(EvaValueError, match=message):
        pad_ranks(eva, tmp_path / "less", r=largest - 1)
    assert not (tmp_path / "less").exists()


@pytest.mark.parametrize(
    ("alphas", "common"),
    [
        pytest.param({"q_proj": 12, "k_proj": 40}, 2, id="most frequent"),
        pytest.param({"q_proj": 12, "v_proj": 12}, 3, id="larger of two"),
        pytest.param({"k_proj": 0, "v_proj": 0, "o_proj": 0}, 2, id="nonzero"),
    ],
)
def test_common_scaling_factor(alphas: dict[str, int], common: float, tmp_path: Path) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    tuned = with_random_adapter(
        llama(), r=4, lora_alpha=8, target_modules=targets, alpha_pattern=alphas
    )
    tuned.save_pretrained(tmp_path / "old")
    pad_ranks(tmp_path / "old", tmp_path / "deep" / "new")
    alpha = config_of(tmp_path / "deep" / "new")["lora_alpha"]
    assert (alpha, type(alpha)) == (4 * common, int)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "deep" / "new").eval()
    torch.testing.assert_close(outputs(loaded), outputs(tuned))


def test_padding_stays_zero_in_training(eva: Path, tmp_path: Path) -> None:
    pad_ranks(eva, tmp_path)
    tuned = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=0.1)
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(2):
        tuned(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    old = load_file(eva / "adapter_model.safetensors")
    now = tuned.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    rank = len(old["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
    first, second = now.lora_A["default"].weight, now.lora_B["default"].weight
    assert first[rank:].count_nonzero() == second[:, rank:].count_nonzero() == 0
    assert first[:rank].count_nonzero() == first[:rank].numel()


def change(folder: Path, target: Path, **fields: Any) -> Path:
    target.mkdir()
    (target / "adapter_config.json").write_text(json.dumps(config_of(folder) | fields))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def test_adapters_that_cannot_be_padded_are_rejected(eva: Path, tmp_path: Path) -> None:
    experts = change(eva, tmp_path / "experts", target_parameters=["experts.down_proj"])
    other = change(eva, tmp_path / "other", peft_type="LOHA")
    wrong = change(eva, tmp_path / "wrong", rank_pattern={}, r=99)
    strange = change(eva, tmp_path / "strange")
    tensors = load_file(strange / "adapter_model.safetensors")
    first = next(iter(tensors))
    renamed = {key.replace("lora_A", "lora_diag"): value for key, value in tensors.items()}
    save_file(renamed, strange / "adapter_model.safetensors")
    halves = {kind: change(eva, tmp_path / kind) for kind in ("lora_A", "lora_B")}
    for kind, half in halves.items():
        part = {key: value for key, value in tensors.items() if kind in key}
        save_file(part, half / "adapter_model.safetensors")
    residual = change(eva, tmp_path / "residual", init_lora_weights="pissa_niter_4")
    damaged, cut = change(eva, tmp_path / "damaged"), change(eva, tmp_path / "cut")
    (damaged / "adapter_model.safetensors").write_bytes(b"no")
    (cut / "adapter_config.json").write_text("{")
    pickled = change(eva, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    without = change(eva, tmp_path / "without")
    save_file({"lm_head.weight": tensors[first]}, without / "adapter_model.safetensors")
    cases = {
        tmp_path: "no adapter_config.json in .*; pass the folder that save_pretrained wrote",
        experts: r"has target_parameters, whose rows cannot be padded; merge it instead",
        other: "of type 'LOHA'; only LORA",
        wrong: r"layer \S+ has rank \d+, but 99 in its config",
        strange: r"lora_diag\S* belongs to a kind of LoRA that cannot be padded",
        halves["lora_A"]: "lacks lora_A or lora_B",
        halves["lora_B"]: "lacks lora_A or lora_B",
        residual: "'pissa_niter_4', which changes the base weights by its rank",
        damaged: "cannot be read",
        cut: "cannot be read",
        pickled: "no adapter_model.safetensors in .*; pass the folder that save_pretrained wrote",
        without: "no LoRA layer",
        eva: "is the folder of the adapter itself",
        eva / ".." / eva.name: "is the folder of the adapter itself",
    }
    for folder, message in cases.items():
        with pytest.raises(EvaValueError, match=message):
            pad_ranks(folder, eva)
    assert sorted(path.name for path in eva.iterdir())[0] == "README.md"


def test_pad_command(eva: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run("pad", eva, "--out", out)
    largest = max(ranks_of(eva))
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout == f"wrote {out}: rank {largest} in all layers, the same outputs\n"
    assert ranks_of(out) == {largest}
    assert "--force" in reason(run("pad", eva, "--out", out))
    assert run("pad", eva, "--out", out, "--force", "--r", largest + 1).exit_code == 0
    assert ranks_of(out) == {largest + 1}
    for force in ((), ("--force",)):  # which would not help
        assert "the adapter itself" in reason(run("pad", eva, "--out", eva, *force))
    assert "the largest rank of a layer" in reason(
        run("pad", eva, "--out", tmp_path / "x", "--r", 1)
    )
    assert not (tmp_path / "x").exists()

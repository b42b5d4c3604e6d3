"""The checkpoint file: which files are rejected, and how it is written."""

from __future__ import annotations

import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eva_kernels import EvaResult, EvaTypeError, EvaValueError, EvaWarning
from eva_peft.resume import checkpoint_file
from eva_peft.resume.checkpoint_file import checksum, read_checkpoint, write_checkpoint
from eva_peft.resume.fingerprint import SAMPLED_ELEMENTS, _sample_elements
from eva_peft.surroundings import files
from integration.conftest import (
    Clash,
    hooks_of,
    lora,
    make_gpt2,
    make_llama,
    make_mlp,
    run,
    vectors,
)
from integration.resume.resumed_passes import (
    CASES,
    check_equal,
    fail_if_called,
    fail_if_iterated,
    forwards_in_checkpoint,
    one_thread,
    run_until_stopped,
)


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a checkpoint of the case "gram" after six forward passes."""
    path = tmp_path_factory.mktemp("kept") / "state.safetensors"
    with one_thread():
        run_until_stopped(CASES["gram"], path, 6)
    return path.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted() -> EvaResult:
    with one_thread():
        return CASES["gram"].result()


@pytest.fixture
def path(checkpoint_bytes: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    path.write_bytes(checkpoint_bytes)
    return path


def check_rejected(path: Path, message: str, **changes: Any) -> None:
    """Expect an error with reason and remedy before any batch, and an unchanged file."""
    before = path.read_bytes()
    options = {"method": "gram", "checkpoint": path, **changes.pop("options", {})}
    model = changes.pop("model", None) or make_llama()
    with pytest.raises(EvaValueError, match=message) as caught:
        run(model, fail_if_iterated(), lora(**{"tau": 1.0, **changes}), **options)
    assert str(path) in str(caught.value)
    assert "delete the file to start from the beginning, or pass another path" in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    assert hooks_of(model) == 0


def llama_with(change: Callable[[Any], Any]) -> nn.Module:
    model = make_llama()
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 5}, r"another pass: r: 4 in the file, 5 now; layers model\.layers\.0\S+ rank: 4"),
        ({"rho": 1.5}, r"rho: 2\.0 in the file, 1\.5 now"),
        ({"rank_pattern": {"down_proj": 2}}, r"1\.mlp\.down_proj rank: 4 in the file, 2 now"),
        ({"target_modules": ["q_proj"]}, r"k_proj features: 64 in the file, absent now"),
        ({"use_label_mask": False}, r"use_label_mask: true in the file, false now"),
        ({"label_mask_value": 1}, r"label_mask_value: -100 in the file, 1 now"),
        ({"options": {"method": "sketch"}}, r"method: gram in the file, sketch now"),
        ({"options": {"oversample": 3.0}}, r"oversample: 2\.0 in the file, 3\.0 now"),
        ({"options": {"seed": 1}}, r"seed: 0 in the file, 1 now"),
        ({"options": {"criterion": "subspace"}}, r"criterion: cosine in the file, subspace now"),
        ({"options": {"precision": "fast"}}, r"precision: high in the file, fast now"),
        ({"options": {"freeze_converged": True}}, r"freeze_converged: false in the file, true"),
        ({"options": {"budget": "params"}}, r"budget: rank in the file, params now"),
        ({"options": {"min_rank": 1}}, r"min_rank: 0 in the file, 1 now"),
        (
            {"options": {"forward_fn": fail_if_called}},
            r"forward_fn: default in the file, own function now",
        ),
        ({"options": {"prepare_model_inputs_fn": None}}, r"_fn: auto in the file, default now"),
        (
            {"options": {"prepare_layer_inputs_fn": {"lm_head": fail_if_called}}},
            r"prepare_layer_inputs_fn: auto in the file, functions for lm_head now",
        ),
    ],
)
def test_changed_config_is_rejected_and_named(
    path: Path, changes: dict[str, Any], message: str
) -> None:
    changes = {**changes}
    if "prepare_layer_inputs_fn" in changes.get("options", {}):
        changes["options"] = {
            "prepare_layer_inputs_fn": {"model.layers.0.mlp.up_proj": fail_if_called}
        }
        message = message.replace("lm_head", r"model\.layers\.0\.mlp\.up_proj")
    check_rejected(path, message, **changes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (make_gpt2, r"model: LlamaForCausalLM in the file, GPT2LMHeadModel now"),
        (lambda: make_llama(torch.bfloat16), r"data type: float32 in the file, bfloat16 now"),
        (lambda: make_llama().double(), r"data type: float32 in the file, float64 now"),
        (
            lambda: llama_with(lambda m: m.model.layers[1].mlp.up_proj.weight.mul_(1.001)),
            r"pass: values of the weights model\.layers\.1\.mlp\.up_proj differ\. To",
        ),
        (
            lambda: llama_with(lambda m: setattr(m.config, "rms_norm_eps", 0.5)),
            r"another pass: model config rms_norm_eps: 1e-06 in the file, 0\.5 now\. To continue",
        ),
        (
            lambda: llama_with(lambda m: m.resize_token_embeddings(104)),
            r"vocab_size: 96 in the file, 104 now; names, shapes and dtypes of the weights differ",
        ),
    ],
)
def test_changed_model_is_rejected_and_named(
    path: Path, model: Callable[[], nn.Module], message: str
) -> None:
    check_rejected(path, message, model=model())


def test_fingerprint_of_models_without_config_or_weights(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    data = [x[:, :16] for x in vectors(3)]
    run(Clash(), data, lora(tau=1.0), max_steps=3, checkpoint=path)
    assert read_checkpoint(path)[0]["fingerprint"]["model config"] is None
    meta = make_mlp().to("meta")
    meta._hf_hook = object()  # as accelerate sets it, which loads the weights of an offloaded model
    with pytest.raises(EvaValueError, match=r"model: Clash in the file, Sequential now"):
        run(meta, fail_if_iterated(), lora(), checkpoint=path)


def test_weight_without_elements_is_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a sharded model; a modulo by its size is an error on a CPU only."""
    size = Tensor.__mod__
    monkeypatch.setattr(Tensor, "__mod__", lambda x, n: size(x, n.clamp_min(1)))
    layer = nn.Module()
    layer.weight = torch.empty(0)
    assert _sample_elements(layer) is None
    layer.weight = torch.full((2, 3), 4.0)
    assert _sample_elements(layer) == [4.0] * SAMPLED_ELEMENTS


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.999])
def test_truncated_file_is_rejected(path: Path, checkpoint_bytes: bytes, share: float) -> None:
    path.write_bytes(checkpoint_bytes[: int(share * len(checkpoint_bytes))])
    check_rejected(
        path, r"not a readable safetensors file \(.*\): it is damaged, cut short, or another"
    )


@pytest.mark.parametrize("content", [b"text", b"\x80\x04]q\x00.", bytes(4096), b"\xff" * 4096])
def test_other_content_is_rejected(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    check_rejected(path, "not a readable safetensors file")


def test_trailing_bytes_are_rejected(path: Path, checkpoint_bytes: bytes) -> None:
    path.write_bytes(checkpoint_bytes + b"more")
    check_rejected(path, "not a readable safetensors file")


def test_flipped_bit_in_a_tensor_is_rejected(path: Path, checkpoint_bytes: bytes) -> None:
    begin = 8 + int.from_bytes(checkpoint_bytes[:8], "little")
    damaged = bytearray(checkpoint_bytes)
    damaged[begin + (len(checkpoint_bytes) - begin) // 2] ^= 4
    path.write_bytes(damaged)
    check_rejected(path, "is damaged: its contents do not match its checksum")


def test_flipped_bit_anywhere_is_rejected_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    write_checkpoint(path, {"a": [1, 2.5, None]}, {"x": torch.arange(5.0), "y": torch.zeros(())})
    good = path.read_bytes()
    state, tensors = read_checkpoint(path)
    accepted = 0
    chosen = random.Random(0)
    for position in (8 * byte + chosen.randrange(8) for byte in range(len(good))):
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found, values = read_checkpoint(path)
        except EvaValueError:
            continue
        # only a change without effect may pass, such as other white space
        accepted += 1
        assert found == state
        assert {k: v.tolist() for k, v in values.items()} == {
            k: v.tolist() for k, v in tensors.items()
        }
    assert accepted < 8


def test_checksum_includes_shapes_and_dtypes() -> None:
    x = torch.arange(6, dtype=torch.int32)
    others = [x.view(2, 3), x.view(3, 2), x.view(torch.float32), x.view(torch.int16)]
    assert len({checksum("", {"x": other}) for other in [x, *others]}) == 5


def test_other_format_version_is_rejected(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, tensors = read_checkpoint(path)
    tensors = {k: v.clone() for k, v in tensors.items()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file, "FORMAT", "eva_kernels.checkpoint/99")
        write_checkpoint(path, state, tensors)
    check_rejected(
        path, r"has the format eva_kernels\.checkpoint/99, expected \S+/1: another version wrote it"
    )


def test_other_safetensors_files_are_rejected(path: Path, uninterrupted: EvaResult) -> None:
    save_file({"weight": torch.zeros(3)}, path)
    check_rejected(
        path, r"has the format not given, expected \S+: it is not a checkpoint of a pass"
    )
    uninterrupted.save(path)
    check_rejected(
        path,
        r"has the format eva_kernels\.result/1, expected \S+: it is not a checkpoint of a pass",
    )


def test_missing_parts_are_named(path: Path) -> None:
    state, tensors = read_checkpoint(path)
    tensors = {k: v.clone() for k, v in tensors.items()}
    write_checkpoint(path, state, {k: v for k, v in tensors.items() if k != "slots.2.pivot"})
    check_rejected(path, "the stored stream has no pivot")
    del state["alone"]
    write_checkpoint(path, state, tensors)
    check_rejected(path, "incomplete, without 'alone'")


@pytest.mark.parametrize("part", ["slots", "fingerprint", "counts"])
def test_part_of_wrong_type_is_rejected(part: str, path: Path) -> None:
    state, tensors = read_checkpoint(path)
    write_checkpoint(path, {**state, part: None}, {k: v.clone() for k, v in tensors.items()})
    check_rejected(path, r"does not hold what this version writes \(.*NoneType")


def test_checkpoint_is_plain_json_and_tensors(path: Path) -> None:
    with safe_open(str(path), framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    assert state["counts"]["forwards"] == 6
    assert state["slots"][0]["members"][0] == "model.layers.0.self_attn.q_proj"
    assert {t.dtype for t in load_file(path).values()} == {
        torch.float32, torch.float64, torch.int64, torch.uint8
    }  # fmt: skip


def test_state_too_long_for_a_header_is_stored_as_a_tensor(tmp_path: Path) -> None:
    state, tensors = {"history": "0" * (100 << 20)}, {"slots.0.mean": torch.ones(3)}
    write_checkpoint(tmp_path / "state", state, tensors)
    found, others = read_checkpoint(tmp_path / "state")
    assert found == state
    assert others.keys() == tensors.keys()
    assert list(tensors) == ["slots.0.mean"]


STEPS = [
    "resume.checkpoint_file.save_file",
    *(f"surroundings.files.os.{name}" for name in ("fsync", "chmod", "replace")),
]


@pytest.mark.parametrize("step", STEPS)
def test_interrupted_write_leaves_the_previous_file(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: EvaResult
) -> None:
    path = tmp_path / "state.safetensors"
    run_until_stopped(CASES["gram"], path, 4)
    before = path.read_bytes()

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"eva_peft.{step}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            CASES["gram"].result(checkpoint=path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    check_equal(CASES["gram"].result(checkpoint=path), uninterrupted)


def test_interrupted_write_is_repeated_on_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, save = tmp_path / "state.safetensors", checkpoint_file.save_file
    interrupts = iter([KeyboardInterrupt])

    def interrupted_once(*args: Any, **kwargs: Any) -> None:
        for error in interrupts:
            raise error
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoint_file, "save_file", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        CASES["gram"].result(checkpoint=path, checkpoint_every=5)
    assert checkpoint_file.read_checkpoint(path)[0]["counts"]["forwards"] == 5


def test_leftovers_of_killed_runs_are_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state[1].safetensors"
    other = tmp_path / f".{path.name}.mine.partial"
    other.touch()

    def killed(tensors: Any, file: Path, metadata: Any) -> None:
        file.with_name(".tmpfnhYNo").touch()  # safetensors writes to its own temporary file first
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *args, **named: None)
        patch.setattr(checkpoint_file, "save_file", killed)
        for _ in range(2):
            with pytest.raises(MemoryError):
                write_checkpoint(path, {}, {})
    assert len(list(tmp_path.iterdir())) == 3
    checkpoint_file.check_path(path)
    assert list(tmp_path.iterdir()) == [other]


def test_concurrent_writers_leave_one_complete_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, save = tmp_path / "state.safetensors", checkpoint_file.save_file

    def save_during_another_write(*args: Any, **named: Any) -> None:
        monkeypatch.setattr(checkpoint_file, "save_file", save)
        save(*args, **named)
        with monkeypatch.context() as patch:  # the other writer has only begun
            patch.setattr(checkpoint_file, "save_file", fail_to_save)
            with pytest.raises(OSError, match="full"):
                write_checkpoint(path, {"number": 2}, {})

    def fail_to_save(*args: Any, **named: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr(checkpoint_file, "save_file", save_during_another_write)
    write_checkpoint(path, {"number": 1}, {})
    assert read_checkpoint(path)[0] == {"number": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_full_disk_warns_and_the_pass_continues(
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: EvaResult,
) -> None:
    path = tmp_path / "state.safetensors"
    run_until_stopped(CASES["gram"], path, 4)
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise error("No space left on device")

    monkeypatch.setattr(checkpoint_file, "save_file", full)
    with pytest.warns(EvaWarning) as warned:
        result = CASES["gram"].result(checkpoint=path, checkpoint_every=6)
    for warning, forwards in zip(warned, (10, 13), strict=True):  # not after every forward pass
        message = str(warning.message)
        assert f"could not be written after {forwards} forward passes (No space left" in message
        assert "the pass continues" in message
    check_equal(result, uninterrupted)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["a folder", "below a file", "no permission", "long", "too long"])
def test_unwritable_path_fails_before_the_pass(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, message = tmp_path, "is a folder; give the path of a file"
    if kind == "below a file":
        (tmp_path / "file").touch()
        path, message = tmp_path / "file" / "state", r"cannot be written \(.*file"
    elif "long" in kind:  # valid by itself, but too long for the temporary folder beside it
        path, message = tmp_path / ((250 if kind == "long" else 300) * "a"), r"\(.* too long: "
    elif kind == "no permission":
        path, message = tmp_path / "state", r"cannot be written \(.*Permission denied"
        monkeypatch.setattr(files.os, "open", raise_permission_error)
    with pytest.raises(EvaValueError, match=message):
        run(make_llama(), fail_if_iterated(), lora(), checkpoint=path)


def raise_permission_error(*args: Any, **kwargs: Any) -> int:
    raise PermissionError(13, "Permission denied")


def test_folders_are_made_links_followed_modes_default(tmp_path: Path) -> None:
    target, link = tmp_path / "new" / "folder" / "state", tmp_path / "link"
    mask = os.umask(0o027)
    try:
        run(make_mlp(), vectors(2), lora(), max_steps=1, checkpoint=str(target))
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        link.symlink_to(target)
        run(make_mlp(), vectors(2), lora(), max_steps=2, checkpoint=link)
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert forwards_in_checkpoint(target) == 2
    assert os.listdir(target.parent) == ["state"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoint": 3}, EvaTypeError, "checkpoint=3 must be a path or None"),
        ({"checkpoint_every": 0}, EvaValueError, "checkpoint_every=0 must be at least 1"),
        ({"checkpoint_every": 1.5}, EvaTypeError, r"checkpoint_every=1\.5 must be a whole number"),
    ],
)
def test_checkpoint_options_are_checked(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(make_mlp(), fail_if_iterated(), lora(), **options)


def test_checkpoint_every_sets_the_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(
        "eva_peft.resume.checkpoint.write_checkpoint",
        lambda path, state, tensors: written.append(state["counts"]["forwards"]),
    )
    for every, options in ((10, {}), (4, {"checkpoint_every": 4})):
        run(make_mlp(), vectors(5), lora(tau=1.0), max_steps=22, checkpoint=tmp_path / "s",
            **options)  # fmt: skip
        assert written == [*range(every, 22, every), 22]
        written.clear()

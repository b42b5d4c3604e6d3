"""``EvaResult``: files, new allocations, apply, summary and metadata; and ``estimate``."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import eva_kernels
from eva_kernels import EvaResult, EvaValueError
from integration.conftest import (
    Clash,
    lora,
    make_llama,
    make_mlp,
    output_of,
    perturb_b,
    run,
    text_batches,
    vectors,
    wrapped,
)


def assert_same(one: EvaResult, other: EvaResult) -> None:
    for field in dataclasses.fields(EvaResult):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name in ("components", "singular_values", "explained_variance_ratio"):
            assert list(a) == list(b)
            for name, value in a.items():
                assert value.dtype == b[name].dtype
                assert torch.equal(value, b[name])
        else:
            assert a == b, field.name


def test_saved_result_loads_equal(llama_result: EvaResult, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "eva.safetensors"
    llama_result.save(path)
    again = EvaResult.load(path)
    assert_same(llama_result, again)
    assert again.config == llama_result.config
    assert os.listdir(path.parent) == ["eva.safetensors"]
    # layers that share an input share the numbers
    distinct = {(t.data_ptr(), t.shape) for t in llama_result.components.values()}
    assert len(distinct) == 8
    assert sum(key.startswith("components.") for key in load_file(path)) == 8
    again.save(path)
    assert_same(llama_result, EvaResult.load(path))


def test_text_too_long_for_a_header_is_stored_as_a_tensor(
    llama_result: EvaResult, tmp_path: Path
) -> None:
    # as the similarities of many experts after many steps
    long = copy.copy(llama_result)
    long.history = {**long.history, "similarity": ["é" * (20 << 20)]}
    path = tmp_path / "eva.safetensors"
    long.save(path)
    assert_same(long, EvaResult.load(path))
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"tokens"', b'"tokans"'))
    with pytest.raises(EvaValueError, match="damaged: its contents do not match"):
        EvaResult.load(path)


def test_state_dict_shares_no_memory(llama_result: EvaResult, tmp_path: Path) -> None:
    state = llama_result.state_dict()
    save_file({n: t for n, t in state.items() if len(t)}, tmp_path / "state.safetensors")
    pointers = [t.untyped_storage().data_ptr() for t in state.values() if len(t)]
    assert len(set(pointers)) == len(pointers)
    for name, rows in state.items():
        assert rows.is_contiguous()
        assert rows.untyped_storage().nbytes() == rows.numel() * 4
        rows.zero_()
        assert llama_result.components[name].any()


def test_tensors_of_any_layout_are_saved(llama_result: EvaResult, tmp_path: Path) -> None:
    result = copy.deepcopy(llama_result)
    one, other, *_, last = result.components
    result.components[other] = result.components[one][:3]  # in the same memory
    result.components[last] = result.components[last].T.contiguous().T
    path = tmp_path / "folder" / "of a folder" / "eva.safetensors"
    result.save(path)
    loaded = EvaResult.load(path)
    for name, rows in result.components.items():
        assert torch.equal(loaded.components[name], rows)


def test_loaded_result_applies_to_base_and_peft_models(
    llama_result: EvaResult, texts: list[Any], tmp_path: Path
) -> None:
    llama_result.save(tmp_path / "eva.safetensors")
    loaded = EvaResult.load(tmp_path / "eva.safetensors")
    outputs = []
    for result, model in (
        (llama_result, make_llama()),
        (loaded, make_llama()),
        (loaded, wrapped(make_llama())),
        (loaded, wrapped(make_llama(), low_cpu_mem_usage=True)),
    ):
        done = result.apply(model)
        assert done.eva_result is result
        perturb_b(done)
        outputs.append(output_of(done, texts[0]))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_config_round_trips() -> None:
    config = lora(
        r=3,
        rho=1.5,
        use_rslora=True,
        lora_dropout=0.1,
        modules_to_save=["head"],
        exclude_modules=["other"],
        rank_pattern={"lin": 2},
        target_modules=["lin", "other"],
        whiten=True,
        bias="lora_only",
        task_type="FEATURE_EXTRACTION",
    )
    result = run(Clash(), vectors(3, features=16), config, max_steps=3)
    json.dumps(result.metadata)
    again = result.config
    for field in dataclasses.fields(LoraConfig):
        a, b = getattr(config, field.name), getattr(again, field.name)
        if isinstance(a, set):
            a, b = sorted(a), sorted(b)
        assert a == b, field.name
    assert again.eva_config == config.eva_config


def test_config_of_plain_lora_raises_no_warning() -> None:
    model = wrapped(make_mlp(), lora(init_lora_weights="gaussian", target_modules=["0"]))
    result = run(model, vectors(3), max_steps=2)
    assert result.config.init_lora_weights == "gaussian"
    assert result.config.eva_config is not None
    assert result.state_dict()["0"].shape == (4, 20)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing", lambda path, result: None, "does not exist"),
        ("folder", lambda path, result: path.mkdir(), "is a folder; pass the file in it"),
        ("empty", lambda path, result: path.write_bytes(b""), "not a readable safetensors"),
        ("text", lambda path, result: path.write_text("eva"), "not a readable safetensors"),
        (
            "foreign",
            lambda path, result: save_file({"x": torch.ones(2)}, path),
            "format is not given.*pass a file that EvaResult.save wrote",
        ),
        (
            "other version",
            lambda path, result: save_file({}, path, {"format": "eva_kernels.result/9"}),
            "result/9.*expected eva_kernels.result/1",
        ),
        (
            "incomplete",
            lambda path, result: save_file({}, path, {"format": "eva_kernels.result/1"}),
            "damaged",
        ),
    ],
)
def test_unreadable_files_are_errors(
    name: str, make: Any, message: str, llama_result: EvaResult, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.safetensors"
    make(path, llama_result)
    with pytest.raises(eva_kernels.EvaValueError, match=message) as caught:
        EvaResult.load(path)
    assert str(path) in str(caught.value)


def test_saving_to_a_folder_is_an_error(llama_result: EvaResult, tmp_path: Path) -> None:
    with pytest.raises(EvaValueError, match=r"is a folder; name a file, such as eva.safetensors"):
        llama_result.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated_file_is_an_error(share: float, llama_result: EvaResult, tmp_path: Path) -> None:
    path = tmp_path / "eva.safetensors"
    llama_result.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(eva_kernels.EvaValueError, match="not a readable safetensors file"):
        EvaResult.load(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_changed_byte_is_detected(share: float, llama_result: EvaResult, tmp_path: Path) -> None:
    path = tmp_path / "eva.safetensors"
    llama_result.save(path)
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")  # of the tensors
    content[begin + int(share * (len(content) - 1 - begin))] ^= 1
    path.write_bytes(content)
    with pytest.raises(EvaValueError, match="damaged: its contents do not match") as caught:
        EvaResult.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        (b'\\"skipped_tokens\\": 0', b'\\"skipped_tokens\\": 7'),
        (b'k_proj\\": \\"components.', b'x_proj\\": \\"components.'),
    ],
)
def test_changed_metadata_is_detected(
    part: bytes, other: bytes, llama_result: EvaResult, tmp_path: Path
) -> None:
    path = tmp_path / "eva.safetensors"
    llama_result.save(path)
    content = path.read_bytes()
    changed = content.replace(part, other)
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(EvaValueError, match="damaged: its contents do not match"):
        EvaResult.load(path)


def test_file_without_a_checksum_loads(llama_result: EvaResult, tmp_path: Path) -> None:
    path = tmp_path / "eva.safetensors"
    llama_result.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    del metadata["checksum"]
    save_file(load_file(path), path, metadata)
    assert_same(llama_result, EvaResult.load(path))


def test_failed_save_leaves_the_old_file(
    llama_result: EvaResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "eva.safetensors"
    llama_result.save(path)
    before = path.read_bytes()

    def failing(*args: Any, **options: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(import_module("eva_peft.resume.checkpoint_file"), "save_file", failing)
    with pytest.raises(OSError, match="disk full"):
        llama_result.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["eva.safetensors"]


def test_reallocated_ranks_obey_budget_and_bounds(llama_result: EvaResult) -> None:
    before = copy.deepcopy(llama_result.ranks)
    small = llama_result.reallocated(r=2)
    assert sum(small.ranks.values()) == 2 * 14
    assert max(small.ranks.values()) <= 4
    flat = llama_result.reallocated(rho=1.0)
    assert set(flat.ranks.values()) == {4}
    wide = llama_result.reallocated(r=2, rho=4.0)
    assert max(wide.ranks.values()) <= 8
    assert sum(wide.ranks.values()) == 28
    floor = llama_result.reallocated(min_rank=2)
    assert min(floor.ranks.values()) >= 2
    assert sum(floor.ranks.values()) == 56
    assert llama_result.reallocated().ranks == before == llama_result.ranks
    narrow = run(make_mlp(), vectors(2), lora(rho=1.5), max_steps=2)
    assert narrow.reallocated().ranks == narrow.ranks
    with pytest.raises(eva_kernels.EvaValueError, match=r"layer .*q_proj: r=8.*has 8; calibrate"):
        llama_result.reallocated(r=8)
    with pytest.raises(eva_kernels.EvaValueError, match="min_rank=9"):
        llama_result.reallocated(min_rank=9)


@pytest.mark.parametrize("reallocate", [True, False])
def test_budget_in_parameters_is_spent(
    reallocate: bool, llama_result: EvaResult, texts: list[Any]
) -> None:
    if reallocate:
        result = llama_result.reallocated(budget="params")
    else:
        options = {"method": "gram", "budget": "params", "early_exit": True}
        result = run(make_llama(), iter(texts), lora(tau=1.0), **options)
        assert result.ranks == llama_result.reallocated(budget="params").ranks
    cost = {n: result.in_features[n] + result.out_features[n] for n in result.ranks}
    allowed = sum(4 * c for c in cost.values())
    spent = sum(r * cost[n] for n, r in result.ranks.items())
    assert allowed - min(cost.values()) < spent <= allowed
    assert result.ranks != llama_result.ranks


def test_min_rank_is_respected(texts: list[Any]) -> None:
    result = run(make_llama(), texts, lora(), max_steps=2, min_rank=3)
    assert min(result.ranks.values()) >= 3
    assert sum(result.ranks.values()) == 56
    result = run(make_llama(), texts, lora(), max_steps=2, min_rank=4)
    assert set(result.ranks.values()) == {4}  # the whole budget
    dead = run(Clash(), vectors(3, features=16), lora(), max_steps=3, min_rank=2)
    assert dead.ranks["sub.lin"] == 0  # there is no direction to assign
    assert sum(dead.ranks.values()) == 16


@pytest.mark.parametrize("method", ["sketch", "gram", "auto"])
def test_estimate_bounds_the_state(
    method: str, texts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("eva_peft.calibrate")
    passes: list[Any] = []
    original = module.CalibrationPass.run

    def spy(self: Any, loader: Any) -> Any:
        passes.append(self)
        return original(self, loader)

    monkeypatch.setattr(module.CalibrationPass, "run", spy)

    def nbytes(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        if dataclasses.is_dataclass(value):
            return sum(nbytes(getattr(value, f.name)) for f in dataclasses.fields(value))
        return 0

    config = lora(r=2, tau=1.0)
    names = [n for n, m in make_llama().named_modules() if n.endswith("_proj")]
    for single in (names[:1], names):
        config = lora(r=2, tau=1.0, target_modules=single)
        estimated = eva_kernels.estimate(make_llama(), config, (4, 24), method=method)
        result = run(make_llama(), iter(texts), config, method=method)
        assert estimated.method == result.method
        assert (
            estimated.peak_bytes
            == estimated.state_bytes + estimated.workspace_bytes + estimated.activation_bytes
        )
        streams = [slot.stream for slot in passes[-1].collector.slots]
        real = 0
        for stream in streams:
            real += nbytes(stream.state)
            if method != "gram" and stream.options.method != "gram":
                real += nbytes(stream.sums)
        assert real <= min(estimated.state_bytes, result.peak_memory_bytes)
        if len(single) == 1:
            assert real > 0.9 * estimated.state_bytes


def test_estimate_counts_the_logits_if_they_are_largest() -> None:
    model = make_llama()
    narrow = eva_kernels.estimate(model, lora(), (4, 24))
    model.resize_token_embeddings(5000)
    wide = eva_kernels.estimate(model, lora(), (4, 24))
    assert wide.activation_bytes == 4 * 96 * 5000 > narrow.activation_bytes
    model.config.final_logit_softcapping = 30.0
    assert eva_kernels.estimate(model, lora(), (4, 24)).activation_bytes == 2 * 4 * 96 * 5000


def test_estimate_counts_the_size_of_float64() -> None:
    single, double = make_llama(), make_llama().double()
    for method in ("sketch", "gram"):
        least, most = (
            eva_kernels.estimate(model, lora(), method=method).state_bytes
            for model in (single, double)
        )
        assert 1.7 * least < most < 2 * least


def test_config_without_eva_config_keeps_that_of_the_result() -> None:
    texts = text_batches(2)
    whitened = run(make_llama(), iter(texts), lora(target_modules=["q_proj"], whiten=True))
    plain = LoraConfig(r=4, target_modules=["q_proj"])
    models = [whitened.apply(make_llama(), config) for config in (None, plain)]
    one, other = ({n: p for n, p in model.named_parameters() if "lora_A" in n} for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_metadata_of_a_model_inside_another_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_llama()
            self.inner.config._name_or_path = "an/origin"

        def forward(self, **batch: Any) -> Any:
            return self.inner(**batch)

    result = run(Outer(), iter(text_batches(1)), lora(target_modules=["q_proj"]), max_steps=1)
    found = result.metadata
    assert (found["model"], found["model_type"]) == ("an/origin", "llama")


def test_memory_budget_chooses_the_method() -> None:
    model = make_llama()
    least = eva_kernels.estimate(model, lora(), method="sketch").state_bytes
    most = eva_kernels.estimate(model, lora(), method="gram").state_bytes
    assert least < most
    tight = eva_kernels.estimate(model, lora(), memory_budget=least)
    assert set(tight.method.values()) == {"sketch"}
    ample = eva_kernels.estimate(model, lora(), memory_budget=most)
    assert set(ample.method.values()) == {"gram"}
    middle = eva_kernels.estimate(model, lora(), memory_budget=most - 1)
    assert set(middle.method.values()) == {"gram", "sketch"}
    assert least <= middle.state_bytes < most
    with pytest.raises(eva_kernels.EvaValueError, match=f"needs at least {least} bytes"):
        run(model, text_batches(1), lora(), memory_budget=least - 1)


def test_summary_lists_kinds_totals_and_uncalled_layers(llama_result: EvaResult) -> None:
    result = dataclasses.replace(
        llama_result,
        ranks={"a.0.up": 0, "a.1.up": 2, "a.2.up": 1, "head": 1},
        explained_variance_ratio=dict.fromkeys(["a.0.up", "a.1.up"], torch.tensor([0.5, 0.25, 0.2]))
        | dict.fromkeys(["a.2.up", "head"], torch.tensor([0.125, 0.1])),
        in_features={"a.0.up": 8, "a.1.up": 32, "a.2.up": 16, "head": 4},
        converged={"a.0.up": True, "a.1.up": False, "a.2.up": True, "head": True},
        uncalled=[f"idle.{i}" for i in range(9)],
    )
    lines = result.summary().splitlines()
    assert lines[1].split() == ["up", "3", "32", "0-2", "12.5%"]
    assert lines[2].split() == ["head", "1", "4", "1-1", "12.5%"]
    assert lines[4] == "total rank 4 over 4 layers, 1 of them without an adapter"
    counts = f"{result.forwards} forward passes, {result.tokens} tokens"
    assert lines[5] == f"3 of 4 layers converged after {result.steps} steps, {counts}"
    idle = ", ".join(result.uncalled[:8])  # also layers that were called without a token
    assert lines[-1] == f"default initialisation: {idle} and 1 more"


def test_summary_distinguishes_kinds_with_the_same_last_name(llama_result: EvaResult) -> None:
    of = {"e.0.attention.output.dense": 8, "e.0.output.dense": 32, "e.0.to_out.0": 16, "a" * 30: 4}
    result = dataclasses.replace(
        llama_result,
        ranks=dict.fromkeys(of, 1),
        explained_variance_ratio=dict.fromkeys(of, torch.tensor([0.5])),
        in_features=of,
    )
    heads, *lines = result.summary().splitlines()[: len(of) + 1]
    assert [line.split()[0] for line in lines] == [*(n.removeprefix("e.0.") for n in of)]
    assert [int(line.split()[2]) for line in lines] == [*of.values()]
    assert {len(line) for line in lines} == {len(heads)}


def test_results_compare_by_identity_and_have_a_short_repr(llama_result: Any) -> None:
    assert llama_result == llama_result
    assert llama_result != copy.copy(llama_result)
    assert re.fullmatch(r"EvaResult\(14 layers, \d+ tokens, \d+ steps\)", repr(llama_result))

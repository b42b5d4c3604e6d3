"""The demo from start to end in its quick form, and the measures that it reports."""

import copy
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from eva_peft.demo import comparison, finetune, run, run_demo
from eva_peft.demo.comparison import OURS, OURS_SAME_FORWARDS, PEFT, QUICK

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "output"
    console = Console(file=io.StringIO(), width=80)
    numbers = run_demo(folder, quick=True, console=console)
    return folder, numbers, console.file.getvalue()


@pytest.fixture(scope="module")
def inputs():
    return comparison.read_inputs(QUICK)


def test_demo_writes_its_files(demo):
    folder, numbers, _ = demo
    names = {path.name for path in folder.iterdir()}
    assert names == {"demo-report.html", "demo.json", "loss.png", "eva.png"}
    assert json.loads((folder / "demo.json").read_text(encoding="utf-8")) == numbers
    for name in ("loss.png", "eva.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_failed_memory_measurement_leaves_no_process(tmp_path, monkeypatch):
    script, children = tmp_path / "python", []
    script.write_text('#!/bin/sh\ncase "$*" in *plain) echo no >&2; exit 1;; esac\nexec sleep 60\n')
    script.chmod(0o755)
    popen = subprocess.Popen

    def recording_popen(*command, **options):
        children.append(popen(*command, **options))
        return children[-1]

    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(subprocess, "Popen", recording_popen)
    try:
        with pytest.raises(
            RuntimeError, match="'plain' could not be measured in a separate process: no"
        ):
            run.measure_memory(quick=True)
        assert [child.poll() is None for child in children] == [False] * 3
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close(), child.stderr.close()


def test_report_page_is_self_contained(demo):
    page = (demo[0] / "demo-report.html").read_text(encoding="utf-8")
    for heading in ("What was run", "Initialisation", "Fine-tuning", "Ranks", "Convergence"):
        assert f"<h2>{heading}</h2>" in page
    for reference in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert reference.startswith(("data:", "#"))


def test_both_tables_are_printed_untruncated(demo):
    text = demo[2]
    for words in (
        "eva-kernels*",
        "PEFT",
        "lost variance",
        "random orthonormal",
        "demo-report.html",
    ):
        assert words in text.replace("\n", "")
    assert "…" not in text


def test_both_packages_use_the_same_total_rank(demo):
    measured = demo[1]["initialisation"]
    for name in (OURS, OURS_SAME_FORWARDS, PEFT):
        assert sum(measured[name]["ranks"].values()) == 35 * QUICK.r
        assert measured[name]["seconds_median"] > 0
        assert measured[name]["forwards"] >= 2
    assert measured[OURS_SAME_FORWARDS]["forwards"] == measured[PEFT]["forwards"]


def test_lost_variance_is_at_most_that_of_peft(demo):
    measured = demo[1]["initialisation"]
    assert 0 <= measured[OURS]["lost_variance"] < 0.02
    assert measured[OURS_SAME_FORWARDS]["lost_variance"] <= measured[PEFT]["lost_variance"] < 0.2


def test_peak_memory_is_below_that_of_peft(demo):
    measured = demo[1]["initialisation"]
    assert measured["plain_peak_bytes"] > 100 * 2**20
    assert measured[OURS]["peak_bytes_above_plain"] < measured[PEFT]["peak_bytes_above_plain"]


def test_every_start_lowers_the_same_initial_loss(demo):
    curves = demo[1]["fine_tuning"]
    assert len(curves) == 3
    assert len({curve["mean"][0] for curve in curves.values()}) == 1
    for curve in curves.values():
        assert curve["steps"] == [0, 3, 6]
        assert curve["rank"] == 35 * QUICK.r
        assert curve["mean"][-1] < curve["mean"][0] < 6


def test_lost_variance_is_zero_for_exact_rows_and_one_for_the_worst():
    covariance = torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.0], dtype=torch.float64))
    eye = torch.eye(4)
    lost = comparison._lost_variance
    assert lost(covariance, eye[:2]) == pytest.approx(0)
    assert lost(covariance, 3 * eye[[1, 0]] + eye[[0, 1]]) == pytest.approx(0)
    assert lost(covariance, eye[[0, 2]]) == pytest.approx(1 - 10 / 13)
    assert lost(covariance, eye[3:]) == pytest.approx(1)


def test_exact_covariances_omit_padding_and_share_inputs(inputs):
    (batch,) = inputs.batches(QUICK)[:1]
    captured = {}

    def keep(_, args):
        captured["x"] = args[0]

    sums = comparison._InputSums(inputs.model)
    layer = "model.layers.1.self_attn.v_proj"
    handle = inputs.model.get_submodule(layer).register_forward_pre_hook(keep)
    with sums, torch.no_grad():
        sums.mask = batch["attention_mask"].bool()
        inputs.model(**batch)
    handle.remove()
    kept = captured["x"][batch["attention_mask"].bool()].double()
    expected = (len(kept) - 1) * torch.cov(kept.T)
    torch.testing.assert_close(sums.covariance(layer), expected)
    assert sums.first_reader[layer] == "model.layers.1.self_attn.q_proj"
    assert len(sums.sums) == 4 * 5
    assert not any(module._forward_pre_hooks for module in inputs.model.modules())


def test_pass_of_peft_stops_at_its_limit(inputs):
    run = comparison.run_peft(inputs.model, inputs.batches(QUICK), QUICK, limit=2)
    assert run.forwards == 2
    assert run.lora_a is None


def test_random_and_orthonormal_starts_differ_in_row_norms(inputs):
    config = QUICK.lora_config()
    for start, seed in ((finetune.random_start, 0), (finetune.orthonormal_start, 1)):
        first, again, other = (
            finetune.lora_a_weights(start(config)(copy.deepcopy(inputs.model), s))
            for s in (seed, seed, seed + 1)
        )
        name = "model.layers.0.mlp.down_proj"
        assert len(first) == 35
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        products = first[name] @ first[name].T
        unit = torch.allclose(products, torch.eye(QUICK.r), atol=1e-5)
        assert unit == (start is finetune.orthonormal_start)


def test_fine_tuning_is_reproducible_and_keeps_base_weights(inputs):
    before = {name: p.clone() for name, p in inputs.model.named_parameters()}
    recipe = finetune.Recipe(steps=2, every=1, batch=2)
    starts = {"random": finetune.random_start(QUICK.lora_config())}
    arguments = (inputs.model, starts, inputs.train[:8, :64], inputs.held_out[:2, :64], recipe)
    first = finetune.compare_starts(*arguments, seeds=2)["random"]
    assert first == finetune.compare_starts(*arguments, seeds=2)["random"]
    assert first.steps == [0, 1, 2]
    assert first.runs[0] != first.runs[1]
    for name, parameter in inputs.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_curve_has_mean_and_standard_error():
    curve = finetune.Curve(steps=[0, 1], runs=[[4.0, 1.0], [4.0, 3.0]], parameters=1, rank=1)
    assert curve.mean() == [4.0, 2.0]
    assert curve.standard_error() == [0.0, pytest.approx(1.0)]
    assert finetune.Curve([0], [[4.0]], 1, 1).standard_error() == [0.0]

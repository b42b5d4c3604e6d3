"""The command line: output files, messages and exit codes of each command."""

import functools
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import eva_kernels
from eva_kernels.streaming import _host
from eva_peft import cli
from eva_peft.command import model_setup
from eva_peft.command.model_setup import Task, load_model
from eva_peft.errors import EvaRuntimeError
from eva_peft.results.result import EvaResult
from eva_peft.surroundings import devices
from integration.command.running import QUICK, data_and_out, init, make_home, reason, run, runner

# PEFT reads a property of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LAYERS = 14  # two blocks of seven
WRITTEN = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
WRITTEN += ["eva.safetensors", "report.html"]
RUN = [sys.executable, "-c", "from eva_peft.cli import main; main()"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def adapter_folder(home: Path) -> Path:
    """Make an adapter folder by `init`, for tests that only read it."""
    out = home / "adapter"
    assert run("init", home / "llama", *data_and_out(home, out), *QUICK).exit_code == 0
    return out


def children_seconds() -> float:
    """Return the CPU time of all child processes, which does not depend on other load."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_help_imports_no_heavy_package_and_is_fast() -> None:
    code = (
        "import sys; from eva_peft import cli; "
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'datasets', 'matplotlib'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    seconds = []
    for _ in range(3):
        start = children_seconds()
        outcome = subprocess.run([*RUN, "--help"], capture_output=True, text=True, check=True)
        seconds.append(children_seconds() - start)
    assert all(command in outcome.stdout for command in ("demo", "init", "info", "report", "pad"))
    assert min(seconds) < 1.0


def test_version_is_printed() -> None:
    command = [sys.executable, "-m", "eva_peft.cli", "--version"]
    assert subprocess.run(command, capture_output=True).stdout.startswith(b"eva-kernels ")
    outcome = run("--version")
    assert outcome.exit_code == 0
    assert outcome.stdout == f"eva-kernels {eva_kernels.__version__}\n"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "cuda:77", "error: --device cuda:77 cannot be used: "),
        ("--device", "gpu", "error: --device gpu cannot be used: "),
        ("--target-modules", " , ", "error: --target-modules ' , ' names no module"),
    ],
)
def test_invalid_options_fail_before_the_model_is_loaded(
    tmp_path: Path, option: str, value: str, message: str
) -> None:
    result = run("init", "no/model", "--data", "no.txt", "--out", tmp_path / "o", option, value)
    assert reason(result).startswith(message)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["init", "m"], "Missing option '--data'"),
        (["init", "m", "--data", "d"], "Missing option '--out'"),
        (["init", "m", "--data", "d", "--out", "o", "--r", "0"], "--r"),
        (["init", "m", "--data", "d", "--out", "o", "--tau", "2"], "--tau"),
        (["init", "m", "--data", "d", "--out", "o", "--method", "svd"], "--method"),
        (["init", "m", "--data", "d", "--out", "o", "--task", "speech"], "--task"),
        (
            ["init", "m", "--data", "d", "--out", "o", "--device", "cpu", "--device-map", "auto"],
            "give --device or --device-map, not both",
        ),
        (["demo", "--seeds", "0"], "--seeds"),
        (["report", "x.safetensors", "--out", "x.pdf"], "must end in one of .html, .png, .svg"),
    ],
)
def test_usage_errors_exit_with_code_2(arguments: list[str], message: str) -> None:
    result = runner().invoke(cli.app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert message in result.stderr


def test_info_shows_versions_devices_and_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    # wheels from PyPI have their build in the module's version only
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(cli.metadata, "version", lambda name: f"that of {name}")
    outcome = run("info")
    assert outcome.exit_code == 0
    for part in ("python", "torch", "2.11.0+cu130", "that of transformers", "cpu", "cuda"):
        assert part in outcome.stdout, part
    from eva_kernels.ops import backend_report

    for op, backend, _ in backend_report():
        assert any(op in line and backend in line for line in outcome.stdout.splitlines())
    assert "eva_kernels._C" in outcome.stdout


def test_info_without_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "matplotlib", "datasets", "eva_kernels._cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    real = cli.metadata.version

    def version(name: str) -> str:
        if name in ("triton", "matplotlib", "datasets"):
            raise cli.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(cli.metadata, "version", version)
    outcome = run("info")
    assert outcome.exit_code == 0
    assert outcome.stdout.count("not installed") == 3
    assert "not usable" in outcome.stdout


def test_info_shows_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: found)
    (line,) = (line for line in run("info").stdout.splitlines() if "cuda:0" in line)
    assert "Some GPU, compute capability 9.0" in line
    assert "80.0 GiB" in line


def test_info_shows_other_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"is_available": True, "current_accelerator": torch.device("xpu"), "device_count": 2}
    for name, answer in found.items():
        monkeypatch.setattr(torch.accelerator, name, lambda answer=answer: answer)
    for home, what in (("xpu", "plain PyTorch"), ("cpu", "sums and folds on the CPU")):
        monkeypatch.setattr(_host, "state_device", lambda device, home=home: torch.device(home))
        outcome = run("info").stdout
        assert [outcome.count(name) for name in ("xpu:0", "xpu:1", "xpu:2")] == [1, 1, 0]
        assert outcome.count(what) == 2
        assert "this torch is CPU only" not in outcome


def test_model_is_moved_to_the_accelerator_by_default(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("meta"))
    given = str(home / "llama"), Task.CAUSAL_LM, "auto"
    assert load_model(*given, None, None, 0).device.type == "meta"
    assert load_model(*given, "cpu", None, 0).device.type == "cpu"


def test_init_writes_an_adapter_that_loads(home: Path, adapter_folder: Path) -> None:
    assert sorted(path.name for path in adapter_folder.iterdir()) == WRITTEN
    result = EvaResult.load(adapter_folder / "eva.safetensors")
    assert sum(result.ranks.values()) == 4 * LAYERS
    assert max(result.ranks.values()) <= 8
    base = AutoModelForCausalLM.from_pretrained(home / "llama").eval()
    tokens = torch.arange(3, 29).reshape(2, 13)
    with torch.no_grad():
        before = base(tokens).logits.clone()
        loaded = PeftModel.from_pretrained(base, adapter_folder).eval()
        after = loaded(tokens).logits
    torch.testing.assert_close(after, before)
    modules = dict(loaded.base_model.model.named_modules())
    for name, rows in result.state_dict().items():
        if result.ranks[name]:
            torch.testing.assert_close(modules[name].lora_A["default"].weight.detach(), rows)
            assert not modules[name].lora_B["default"].weight.any()
    assert "EVA initialisation of" in (adapter_folder / "report.html").read_text(encoding="utf-8")


def test_init_is_bitwise_reproducible(home: Path, adapter_folder: Path, tmp_path: Path) -> None:
    outcome = init(home, tmp_path / "out")
    assert outcome.exit_code == 0
    assert "total rank 56 over 14 layers" in outcome.stdout
    assert str(tmp_path / "out") in outcome.stdout
    assert "is_trainable=True" in outcome.stdout  # without it PEFT freezes the adapter
    first, second = (
        load_file(f / "adapter_model.safetensors") for f in (adapter_folder, tmp_path / "out")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"], "the temporary folder is gone"
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain" / "file").stat().st_mode}


def test_options_override_the_config_file(home: Path, tmp_path: Path) -> None:
    config = {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "k_proj"], "use_rslora": True}
    config |= {"eva_config": {"rho": 1.0, "tau": 0.1}, "inference_mode": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--config", tmp_path / "config.json", "--target-modules", "q_proj, v_proj"]
    assert init(home, tmp_path / "out", *options, "--method", "gram", "--seed", "5").exit_code == 0
    saved = PeftConfig.from_pretrained(tmp_path / "out")
    assert (saved.r, saved.lora_alpha, saved.use_rslora) == (4, 7, True)
    assert saved.task_type == "CAUSAL_LM"
    result = EvaResult.load(tmp_path / "out" / "eva.safetensors")
    assert {name.rpartition(".")[2] for name in result.ranks} == {"q_proj", "v_proj"}
    assert set(result.method.values()) == {"gram"}
    assert set(result.ranks.values()) == {4}, "rho 1 leaves no room"
    assert result.metadata["lora_config"]["eva_config"]["tau"] == 0.5
    assert result.config.inference_mode is False
    assert result.metadata["options"]["seed"] == 5


def test_defaults_are_those_of_initialize(home: Path, tmp_path: Path) -> None:
    from eva_peft import default_config

    fields = model_setup.config_fields(None, {"r": None}, {"rho": None})
    mine, theirs = model_setup.lora_config(fields, cli.Task.CAUSAL_LM), default_config()
    mine.task_type = None
    assert mine.to_dict() == theirs.to_dict()


def test_init_of_an_encoder_decoder(home: Path, tmp_path: Path) -> None:
    config = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "k", "v", "o"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = init(home, tmp_path / "a", "--config", tmp_path / "config.json", model="t5")
    assert outcome.exit_code == 0, outcome.stderr
    result = EvaResult.load(tmp_path / "a" / "eva.safetensors")
    assert len(result.ranks) == 12
    assert not result.uncalled
    base = AutoModelForSeq2SeqLM.from_pretrained(home / "t5")
    assert PeftModel.from_pretrained(base, tmp_path / "a").peft_config["default"].r == 4


@pytest.mark.parametrize("task", ["sequence-classification", "feature-extraction"])
def test_init_for_other_tasks(home: Path, tmp_path: Path, task: str) -> None:
    outcome = init(home, tmp_path / "out", "--task", task, "--dtype", "bfloat16")
    assert outcome.exit_code == 0, outcome.stderr
    saved = PeftConfig.from_pretrained(tmp_path / "out")
    assert saved.task_type == model_setup._TASKS[cli.Task(task)][1]
    result = EvaResult.load(tmp_path / "out" / "eva.safetensors")
    assert result.metadata["dtype"] == "bfloat16"
    assert len(result.ranks) == LAYERS


@pytest.mark.filterwarnings("always")
def test_warnings_are_printed_in_one_line(home: Path, tmp_path: Path) -> None:
    outcome = init(home, tmp_path / "out", "--tau", "1", "--max-steps", "2")
    assert outcome.exit_code == 0
    lines = [line for line in outcome.stderr.splitlines() if "have not converged" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: 14 of 14 layers")
    assert "0 of 14 layers converged after" in outcome.stdout


def test_non_empty_folder_needs_force(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "report.html").write_text("old")
    assert "is not empty; pass --force to replace files" in reason(init(home, out))
    assert (out / "report.html").read_text() == "old"
    assert init(home, out, "--force").exit_code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(p.name for p in out.iterdir()) == sorted([*WRITTEN, "notes.txt"])
    assert list(tmp_path.iterdir()) == [out]


def test_existing_empty_folder_is_used(home: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert init(home, tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_file_as_output_folder_is_an_error(home: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file; give a folder" in reason(init(home, tmp_path / "out", "--force"))
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"rank": 3}', "LoraConfig has no field 'rank'"),
        ('{"eva_config": {"steps": 3}}', "EvaConfig has no field 'steps'"),
        ('{"eva_config": 3}', "eva_config must be a JSON object"),
        ('{"peft_type": "IA3"}', "is a config for IA3; EVA initialises LoRA adapters only"),
        ('{"init_lora_weights": "pissa"}', "sets init_lora_weights='pissa'; set it to 'eva'"),
        ('{"layers_pattern": "h"}', "PEFT rejects the LoRA config"),
    ],
)
def test_invalid_config_files_are_errors(
    home: Path, tmp_path: Path, content: str, message: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(content)
    assert message in reason(init(home, tmp_path / "out", "--config", config))
    assert list(tmp_path.iterdir()) == [config]


def test_failures_leave_nothing_behind(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert "there is no file" in reason(init(home, out, "--config", tmp_path / "no.json"))
    assert "there is no file" in reason(init(home, out, "--data", tmp_path / "no.jsonl"))
    assert "no column 'body'" in reason(init(home, out, "--text-column", "body"))
    assert "no-such-model" in reason(run("init", home / "no-such-model", *data_and_out(home, out)))
    assert "no_proj" in reason(init(home, out, "--target-modules", "no_proj"))
    for error in (OSError(28, "No space left"), SafetensorError("I/O error: No space left")):
        full = mock.Mock(side_effect=error)
        monkeypatch.setattr("eva_peft.results.report.write_html", full)
        assert f"--out {out} cannot be written ({error}); nothing in it" in reason(init(home, out))
    assert list(tmp_path.iterdir()) == []


def replace_initialize(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def initialize(*args: Any, **kwargs: Any) -> None:
        if "checkpoint" in kwargs:
            Path(kwargs["checkpoint"]).touch()
        raise error

    monkeypatch.setattr(importlib.import_module("eva_peft.initialize"), "initialize", initialize)


def test_debug_shows_the_traceback(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_initialize(monkeypatch, EvaRuntimeError("layer [b]x[/b]:\n  bad"))
    assert reason(init(home, tmp_path / "out")) == "error: layer [b]x[/b]: bad"
    arguments = ["init", home / "llama", *data_and_out(home, tmp_path / "out")]
    outcome = run("--debug", *arguments)
    assert outcome.exit_code == 1
    assert "Traceback (most recent call last)" in outcome.stderr
    assert outcome.stderr.endswith("error: layer [b]x[/b]: bad\n")


def test_unexpected_errors_show_their_type(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_initialize(monkeypatch, KeyError("x"))
    assert reason(init(home, tmp_path / "out")).startswith("error: KeyError: 'x' (")


def test_interrupt_reports_whether_a_checkpoint_was_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_initialize(monkeypatch, KeyboardInterrupt())
    out, checkpoint = tmp_path / "out", tmp_path / "state.safetensors"
    outcome = init(home, out)
    assert outcome.exit_code == 130
    assert outcome.stderr.endswith("interrupted: nothing was saved\n")
    outcome = init(home, out, "--checkpoint", checkpoint)
    assert outcome.exit_code == 130
    assert f"the checkpoint {checkpoint} was kept; run the same command again" in outcome.stderr
    checkpoint.unlink()
    outcome = init(home, out, "--checkpoint", checkpoint, "--text-column", "body")
    assert outcome.exit_code == 1
    monkeypatch.setattr("eva_peft.command.data.load_texts", _raise_interrupt)
    outcome = init(home, out, "--checkpoint", checkpoint)
    assert "no checkpoint had been written" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


def _raise_interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize(("number", "word"), [(2, "interrupted"), (15, "terminated")])
def test_signal_during_the_pass_ends_the_command(
    home: Path, tmp_path: Path, number: int, word: str
):
    out = tmp_path / "out"
    arguments = ["init", home / "llama", *data_and_out(home, out), *QUICK, "--tau", "1"]
    arguments += ["--max-steps", "1000000"]
    process = subprocess.Popen(
        [*RUN, *map(str, arguments)],
        stderr=subprocess.PIPE,
        start_new_session=True,
        # background jobs ignore SIGINT, and child processes inherit that
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    output = b""
    while b"step 3" not in output:
        chunk = process.stderr.read1()
        assert chunk, f"ended early: {output!r}"
        output += chunk
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert rest.decode().rstrip().endswith(f"{word}: nothing was saved")
    assert b"Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".html", ".png", ".svg"])
def test_report_writes_each_format(adapter_folder: Path, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"report{suffix}"
    outcome = run("report", adapter_folder / "eva.safetensors", "--out", target)
    assert outcome.exit_code == 0
    assert outcome.stdout == f"wrote {target}\n"
    start = {".html": b"<!DOCTYPE html>", ".png": b"\x89PNG", ".svg": b"<?xml"}[suffix]
    assert target.read_bytes().startswith(start)


def test_report_is_written_beside_its_file_by_default(adapter_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "eva.safetensors"
    file.write_bytes((adapter_folder / "eva.safetensors").read_bytes())
    assert run("report", file).exit_code == 0
    assert (tmp_path / "eva.html").is_file()


def test_report_of_an_adapter_folder(adapter_folder: Path, tmp_path: Path) -> None:
    assert run("report", adapter_folder, "--out", tmp_path / "r.html").exit_code == 0
    assert (tmp_path / "r.html").is_file()
    assert f"there is no file {tmp_path / 'eva.safetensors'}" in reason(run("report", tmp_path))


def test_report_of_other_files_is_an_error(adapter_folder: Path, tmp_path: Path) -> None:
    assert "there is no file" in reason(run("report", tmp_path / "no.safetensors"))
    (tmp_path / "a.safetensors").write_text("text")
    assert "not a readable safetensors file" in reason(run("report", tmp_path / "a.safetensors"))
    assert "not a result of this version" in reason(
        run("report", adapter_folder / "adapter_model.safetensors")
    )


def test_demo_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, dict[str, Any]]] = []
    demo = importlib.import_module("eva_peft.demo")
    monkeypatch.setattr(demo, "run_demo", lambda out, **options: calls.append((out, options)))
    assert run("demo", "--out", tmp_path / "d", "--quick", "--seeds", "2").exit_code == 0
    assert run("demo").exit_code == 0
    (first, quick), (second, full) = calls
    assert (first, quick["quick"], quick["seeds"]) == (tmp_path / "d", True, 2)
    assert (second, full["quick"], full["seeds"]) == (Path("demo-report"), False, 3)
    monkeypatch.setattr(demo, "run_demo", _raise_interrupt)
    outcome = run("demo")
    assert outcome.exit_code == 130
    assert outcome.stderr == "interrupted: nothing was saved\n"


def test_checkpoint_in_the_output_folder(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--checkpoint", out / "pass.safetensors")
    assert init(home, out, *arguments).exit_code == 0
    kept = {"pass.safetensors", "adapter_config.json", "adapter_model.safetensors"}
    assert kept <= {path.name for path in out.iterdir()}
    for path in out.iterdir():
        path.unlink() if path.name != "pass.safetensors" else None
    assert init(home, out, *arguments).exit_code == 0  # as after an interruption

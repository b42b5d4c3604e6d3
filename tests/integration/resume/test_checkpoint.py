"""A stopped or killed pass resumes to the bitwise result of an uninterrupted one."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import eva_kernels
from eva_kernels import EvaResult, EvaValueError, NotConvergedWarning
from eva_peft import cli
from eva_peft.resume.checkpoint_file import read_checkpoint, write_checkpoint
from integration.command.running import runner
from integration.conftest import (
    lora,
    make_llama,
    make_mlp,
    run,
    text_batches,
    vectors,
    wrapped,
)
from integration.resume import resumed_passes
from integration.resume.resumed_passes import (
    CASES,
    EPOCH,
    FORWARDS,
    Case,
    Endless,
    Noisy,
    Stop,
    check_equal,
    checkpoint_of,
    fail_if_called,
    fail_if_iterated,
    forwards_in_checkpoint,
    kill_points,
    one_thread,
    run_until_stopped,
)

KILL_CASES = [(name, where) for name in CASES for where in kill_points(name)]


@pytest.fixture(scope="module")
def killed_passes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kill every case at every point, in one process that imports everything once."""
    folder = tmp_path_factory.mktemp("killed")
    tests = Path(__file__).resolve().parents[2]
    roots = os.pathsep.join([str(tests), *filter(None, sys.path)])
    completed = subprocess.run(
        [sys.executable, resumed_passes.__file__, str(folder)],
        env={**os.environ, "PYTHONPATH": roots, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    lines = completed.stdout.splitlines()
    assert len(lines) == len(KILL_CASES)
    assert all(line.endswith(f"|{-signal.SIGKILL}") for line in lines), lines
    # most had written a checkpoint, so resuming is tested
    assert (
        sum(checkpoint_of(folder, *place).is_file() for place in KILL_CASES) > len(KILL_CASES) / 2
    )
    return folder


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, EvaResult]:
    with one_thread():
        return {name: case.result() for name, case in CASES.items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and SIGKILL")
@pytest.mark.parametrize(("name", "where"), KILL_CASES)
def test_killed_pass_resumes_to_the_same_result(
    name: str, where: str, killed_passes: Path, uninterrupted: dict[str, EvaResult]
) -> None:
    path = checkpoint_of(killed_passes, name, where)
    seen = forwards_in_checkpoint(path) if path.is_file() else 0
    assert seen % 3 == 0
    assert seen < FORWARDS
    result = CASES[name].result(checkpoint=path)
    check_equal(result, uninterrupted[name])
    # files left by a killed write are removed
    assert os.listdir(path.parent) == [path.name]
    assert forwards_in_checkpoint(path) == result.forwards


def test_cases_have_the_properties_of_their_names(uninterrupted: dict[str, EvaResult]) -> None:
    several = uninterrupted["steps of several batches"]
    assert several.steps < several.forwards - 2
    assert max(several.history["forwards"]) == FORWARDS
    for name in ("frozen layers", "subspace"):
        assert 3 < uninterrupted[name].forwards < FORWARDS
        assert all(uninterrupted[name].converged.values())
    assert uninterrupted["changing sharing"].shared_inputs == []
    assert uninterrupted["sketch"].shared_inputs[0][:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    assert set(uninterrupted["gram"].method.values()) == {"gram"}


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", ["gram", "steps of several batches", "changing sharing"])
def test_exception_of_the_loader_keeps_the_last_forward(
    name: str, error: type[BaseException], tmp_path: Path, uninterrupted: dict[str, EvaResult]
) -> None:
    path = tmp_path / "state.safetensors"
    run_until_stopped(CASES[name], path, 7, error)
    assert forwards_in_checkpoint(path) == 7
    check_equal(CASES[name].result(checkpoint=path), uninterrupted[name])


def test_interrupt_in_the_callback_keeps_the_last_step(
    tmp_path: Path, uninterrupted: dict[str, EvaResult]
) -> None:
    path = tmp_path / "state.safetensors"

    def interrupt(numbers: dict[str, Any]) -> None:
        if numbers["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CASES["sketch"].result(checkpoint=path, callback=interrupt)
    assert forwards_in_checkpoint(path) == 4
    steps: list[int] = []
    result = CASES["sketch"].result(checkpoint=path, callback=lambda n: steps.append(n["step"]))
    check_equal(result, uninterrupted["sketch"])
    assert steps == list(range(5, FORWARDS + 1))  # no step repeated or skipped


@pytest.mark.parametrize("where", ["forward", "fold"])
def test_partial_forward_is_never_written(
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, EvaResult],
) -> None:
    path, model, calls = tmp_path / "state.safetensors", make_llama(), iter(range(8))

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    if where == "forward":  # half of the layers have been accumulated by then
        model.model.layers[1].register_forward_pre_hook(interrupt)
    else:
        calibrate = import_module("eva_peft.calibrate")
        compare = calibrate.compare_streams

        def interrupted(*args: Any, **kwargs: Any) -> None:
            interrupt()
            compare(*args, **kwargs)

        monkeypatch.setattr(calibrate, "compare_streams", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, text_batches(EPOCH), lora(tau=1.0), method="sketch", checkpoint=path,
            checkpoint_every=3)  # fmt: skip
    assert forwards_in_checkpoint(path) == 6
    monkeypatch.undo()
    check_equal(CASES["sketch"].result(checkpoint=path), uninterrupted["sketch"])


@pytest.mark.parametrize("name", ["sketch", "frozen layers", "changing sharing"])
def test_final_checkpoint_equals_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    case, files = CASES[name], (tmp_path / "whole", tmp_path / "resumed")
    case.result(checkpoint=files[0])
    run_until_stopped(case, files[1], 3)
    case.result(checkpoint=files[1])
    (left, left_tensors), (right, right_tensors) = map(read_checkpoint, files)
    for state in (left, right):  # nothing but the time may differ
        del state["elapsed"], state["counts"]["seconds"], state["counts"]["history"]["seconds"]
    assert left == right
    assert left["most_calls"]
    assert bool(left["alone"]) == (name == "changing sharing")
    assert bool(left["frozen"]) == (name == "frozen layers")
    assert left_tensors.keys() == right_tensors.keys()
    assert all(torch.equal(left_tensors[key], right_tensors[key]) for key in left_tensors)


def test_no_checkpoint_before_the_first_forward(tmp_path: Path) -> None:
    run_until_stopped(CASES["sketch"], tmp_path / "state.safetensors", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gram", "frozen layers"])
def test_finished_pass_runs_no_forward(
    name: str, tmp_path: Path, uninterrupted: dict[str, EvaResult]
) -> None:
    path, case = tmp_path / "state.safetensors", CASES[name]
    check_equal(case.result(checkpoint=path), uninterrupted[name])
    model = case.model()
    model.register_forward_pre_hook(fail_if_called)
    before = path.stat()
    options = {"max_steps": FORWARDS, **case.options}
    again = run(model, fail_if_iterated(), lora(tau=case.tau), checkpoint=path, **options)
    check_equal(again, uninterrupted[name])
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert again.seconds["total"] > uninterrupted[name].seconds["forward"] / 100


@pytest.mark.parametrize("name", ["gram", "steps of several batches"])
def test_higher_limit_resumes_a_finished_pass(
    name: str, tmp_path: Path, uninterrupted: dict[str, EvaResult]
) -> None:
    # The last, partial step of the first run must not have been folded in the file.
    path = tmp_path / "state.safetensors"
    first = CASES[name].result(checkpoint=path, max_steps=7)
    assert first.forwards == 7
    check_equal(CASES[name].result(checkpoint=path), uninterrupted[name])


@pytest.mark.parametrize("limit", ["max_steps", "max_tokens", "max_seconds"])
def test_limits_include_the_first_run(limit: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    run_until_stopped(CASES["gram"], path, 6)
    state = read_checkpoint(path)[0]
    value = {
        "max_steps": 6,
        "max_tokens": state["counts"]["tokens"],
        "max_seconds": state["elapsed"],
    }[limit]
    options = {limit: value, "checkpoint": path, "method": "gram", "on_not_converged": "warn"}
    with pytest.warns(NotConvergedWarning, match="14 of 14 layers have not converged after 6"):
        result = run(make_llama(), fail_if_iterated(), lora(tau=1.0), **options)
    assert result.forwards == 6
    assert result.seconds["total"] > state["elapsed"]


def test_seconds_accumulate_over_all_runs(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    run_until_stopped(CASES["gram"], path, 2)
    state, tensors = read_checkpoint(path)
    write_checkpoint(path, {**state, "elapsed": 1000.0}, {k: v.clone() for k, v in tensors.items()})
    run_until_stopped(CASES["gram"], path, 5)
    assert 1000 < read_checkpoint(path)[0]["elapsed"] < 1500
    options = {"checkpoint": path, "method": "gram", "max_seconds": 1000}
    assert run(make_llama(), fail_if_iterated(), lora(tau=1.0), **options).forwards == 5


def test_another_tau_is_applied_to_the_stored_similarity(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    for criterion in ("cosine", "subspace"):
        path.unlink(missing_ok=True)
        options = {"checkpoint": path, "criterion": criterion, "method": "sketch"}
        strict = run(make_llama(), text_batches(8), lora(tau=1.0), max_steps=8, **options)
        assert not any(strict.converged.values())
        lenient = run(make_llama(), fail_if_iterated(), lora(tau=0.3), **options)
        assert all(lenient.converged.values())
        assert lenient.forwards == 8
        path.unlink()
        run(make_llama(), text_batches(8), lora(tau=0.3), **options)
        before = forwards_in_checkpoint(path)
        again = run(make_llama(), text_batches(8), lora(tau=1.0), max_steps=before + 1, **options)
        assert again.forwards == before + 1


def test_another_tau_before_the_first_step(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    few = resumed_passes.Case(make_mlp, lambda: vectors(1, rows=5), options={"checkpoint_every": 1})
    run_until_stopped(few, path, 1)
    assert forwards_in_checkpoint(path) == 1
    options = {"max_steps": 2, "checkpoint": path}
    again = run(make_mlp(), few.batches(), lora(tau=0.3), **options)
    assert again.forwards == 2
    assert not any(again.converged.values())


def test_options_outside_the_fingerprint_may_change(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    run_until_stopped(CASES["gram"], path, 6)
    other = lora(tau=1.0, lora_alpha=99, whiten=True)
    options = {"on_nonfinite": "skip", "checkpoint_every": 1, "early_exit": False, "max_steps": 7}
    result = run(make_llama(), text_batches(EPOCH), other, method="gram", checkpoint=path,
                 on_not_converged="ignore", backend="torch", **options)  # fmt: skip
    assert result.forwards == 7
    assert result.config.lora_alpha == 99


# PEFT reads a property of transformers by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("how", ["base", "adapters", "meta", "renamed"])
def test_wrapped_and_renamed_models_may_resume(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    run_until_stopped(CASES["gram"], path, 4)
    model = make_llama()
    if how == "renamed":
        model.config._name_or_path, model.config.use_cache = "elsewhere", False
        monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0")
    if how in ("adapters", "meta"):
        config = lora(tau=1.0, modules_to_save=["lm_head"])
        model = wrapped(model, config, low_cpu_mem_usage=how == "meta")
    config = None if how in ("adapters", "meta") else lora(tau=1.0)
    options = {"method": "gram", "max_steps": 5, "progress": False, "on_not_converged": "ignore"}
    done = eva_kernels.initialize(model, text_batches(EPOCH), config, checkpoint=path, **options)
    assert done.eva_result.forwards == 5


@pytest.mark.parametrize("twice", [(0, 4), (2,)])
def test_resumed_pass_exits_forwards_early_as_before(
    twice: tuple[int, ...], tmp_path: Path
) -> None:
    """After the first call of every layer, if none was called twice before."""

    class CalledTwiceForSome(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.tanh(self.a(x)))
            return self.a(torch.tanh(y)) if x[0, 0] == 5 else y

    batches = vectors(5)
    for i in twice:
        batches[i][0, 0] = 5
    case = Case(CalledTwiceForSome, lambda: batches, options={"method": "gram", "max_steps": 5})
    path = tmp_path / "state.safetensors"
    run_until_stopped(case, path, 2)
    check_equal(case.result(checkpoint=path), case.result())


def test_generator_must_yield_the_same_batches_again(
    tmp_path: Path, uninterrupted: dict[str, EvaResult]
) -> None:
    path, case = tmp_path / "state.safetensors", CASES["gram"]
    run_until_stopped(case, path, 7)
    before = path.read_bytes()
    with pytest.raises(
        EvaValueError, match=r"was written after 7 batches, but the loader ended after 5"
    ):
        case.result(iter(case.batches()), checkpoint=path)
    assert path.read_bytes() == before
    endless = Endless(case.batches(), lambda: None)
    check_equal(
        case.result(islice(iter(endless), FORWARDS), checkpoint=path), uninterrupted["gram"]
    )


@pytest.mark.parametrize("stop", [4, EPOCH, 7])
def test_shuffling_loader_yields_the_same_order(stop: int, tmp_path: Path) -> None:
    """In any epoch, though the model draws random numbers."""
    path = tmp_path / "state.safetensors"
    data = torch.cat(vectors(EPOCH))

    def loader() -> DataLoader[Tensor]:
        return DataLoader(data, batch_size=40, shuffle=True)  # type: ignore[arg-type]

    def result(seed: int, **options: Any) -> EvaResult:
        model = Noisy()
        torch.manual_seed(seed)
        return run(model, loader(), lora(tau=1.0), method="sketch", **options)

    whole = result(5, max_steps=9)
    result(5, max_steps=stop, checkpoint=path)
    other = result(6, max_steps=9)
    assert not torch.equal(other.components["layers.0"], whole.components["layers.0"])
    # regardless of the seed of the second run
    check_equal(result(6, max_steps=9, checkpoint=path), whole)


def test_random_state_of_the_caller_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    run_until_stopped(CASES["random forward"], path, 4)
    model, batches = Noisy(), vectors(EPOCH)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    run(model, batches, lora(tau=1.0), max_steps=6, checkpoint=path)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore::eva_kernels.errors.NotConvergedWarning")
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_interrupted_init_command_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = Path(sys.modules["eva_peft"].__file__ or "").parent / "assets" / "tiny_llama"
    lines = (Path(__file__).read_text(encoding="utf-8") * 2).splitlines()
    (tmp_path / "data.txt").write_text("\n".join(line for line in lines if len(line) > 30))
    path = tmp_path / "state.safetensors"

    def command(out: str, *more: object) -> list[str]:
        options = ["--r", "4", "--batch-size", "2", "--max-length", "24", "--tau", "1"]
        data = ["--data", tmp_path / "data.txt", "--out", tmp_path / out]
        return [str(part) for part in ("init", assets, *data, *options, *more)]

    code = "from eva_peft.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command("first", "--checkpoint", path)],
        stderr=subprocess.PIPE,
        start_new_session=True,
        # background jobs ignore SIGINT, and child processes inherit that
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    seen = b""
    while b"step 12" not in seen:
        chunk = process.stderr.read1()  # type: ignore[attr-defined]
        assert chunk, f"ended early: {seen!r}"
        seen += chunk
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert f"the checkpoint {path} was kept; run the same command again to resume" in rest
    assert "Traceback" not in rest
    assert not (tmp_path / "first").exists()

    monkeypatch.setattr("eva_peft.results.report.write_html", lambda result, path: None)  # slow
    done = forwards_in_checkpoint(path)
    assert done >= 10
    limit = ("--max-steps", done + 3)
    for out, more in (("resumed", ("--checkpoint", path)), ("uninterrupted", ())):
        completed = runner().invoke(cli.app, command(out, *limit, *more))
        assert completed.exit_code == 0, completed.output
    check_equal(
        *(
            EvaResult.load(tmp_path / out / "eva.safetensors")
            for out in ("resumed", "uninterrupted")
        )
    )
    weights = [tmp_path / out / "adapter_model.safetensors" for out in ("resumed", "uninterrupted")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert forwards_in_checkpoint(path) == done + 3

    completed = runner().invoke(cli.app, command("other", "--checkpoint", path, "--r", 5))
    assert completed.exit_code == 1
    assert "belongs to another pass: r: 4 in the file, 5 now" in completed.stderr

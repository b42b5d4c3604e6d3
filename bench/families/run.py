"""Initialise the adapters of every family with this package and with PEFT's defaults."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..common import save
from . import FAMILIES, Family

RANK, RHO = 4, 2.0
BATCHES = 6
MAX_FORWARDS = 300  # PEFT has no limit of its own; ours needs under 60
SECONDS = 120
SIDES = ("ours", "peft")


def attempt(name: str, side: str) -> dict[str, Any]:
    """Initialise, train one step, save and load; return how far that got.

    Returns:
        ``stage`` that failed (``None`` if none did) and ``error``, the first line of the exception;
        also forward passes, layers and warnings.
    """
    family = FAMILIES[name]
    outcome: dict[str, Any] = {"stage": "initialise", "error": None, "forwards": 0, "warnings": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _run_stages(family, side, outcome)
        except Exception as error:  # any exception is a result
            text = str(error).strip().split("\n")[0]
            outcome["error"] = f"{type(error).__name__}: {text}"[:160]
    warning_names = {w.category.__name__ for w in caught}
    outcome["warnings"] = sorted(warning_names & {"EvaWarning", "NotConvergedWarning"})
    return outcome


def _run_stages(family: Family, side: str, outcome: dict[str, Any]) -> None:
    from peft import PeftModel

    base, data = family.make_model(), family.make_batches(BATCHES)
    counter = base.register_forward_pre_hook(_forward_counter(outcome), prepend=True)
    model: Any = (_initialize_ours if side == "ours" else _initialize_peft)(base, data, family)
    counter.remove()
    outcome["layers"] = sum(hasattr(m, "lora_A") and bool(m.lora_A) for m in model.modules())
    outcome["stage"] = "train"
    batch = _as_dict_batch(base, data[0]) if side == "peft" else data[0]
    family.loss(model.train(), batch).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    if not any(p.grad is not None and p.grad.any() for p in trained):
        raise ValueError("no gradient reaches an adapter")
    torch.optim.SGD(trained, 0.05).step()
    outcome["stage"] = "reload"
    model.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        reloaded = PeftModel.from_pretrained(family.make_model(), folder).eval()
        loss_before, loss_after = (family.loss(m, batch) for m in (model, reloaded))
    if not torch.allclose(loss_before, loss_after, rtol=1e-5, atol=1e-6):
        raise ValueError(
            f"the loaded adapter gives {float(loss_after):.6g}, not {float(loss_before):.6g}"
        )
    outcome["stage"] = None


def _forward_counter(outcome: dict[str, Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        outcome["forwards"] += 1
        if outcome["forwards"] > MAX_FORWARDS:
            raise RuntimeError(f"did not end within {MAX_FORWARDS} forward passes")

    return hook


def _config(family: Family) -> Any:
    from peft import EvaConfig, LoraConfig

    fields = {"target_modules": "all-linear", **family.config}
    return LoraConfig(r=RANK, init_lora_weights="eva", eva_config=EvaConfig(rho=RHO), **fields)


def _initialize_ours(base: nn.Module, data: Sequence[Any], family: Family) -> nn.Module:
    import eva_kernels

    return eva_kernels.initialize(base, data, _config(family), progress=False)


def _initialize_peft(base: nn.Module, data: Sequence[Any], family: Family) -> nn.Module:
    from peft import get_peft_model, initialize_lora_eva_weights

    model = get_peft_model(base, _config(family), low_cpu_mem_usage=True)
    batches = [_as_dict_batch(base, batch) for batch in data]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def _as_dict_batch(model: nn.Module, batch: Any) -> Any:
    """Return a batch as a dict, which PEFT requires."""
    if not isinstance(batch, Tensor):
        return batch
    return {next(iter(inspect.signature(model.forward).parameters)): batch}


def run(names: Sequence[str] | None = None, write: bool = False) -> list[dict[str, Any]]:
    """Try all families, each in a separate process, and return the outcomes."""
    rows = []
    chosen = list(names or FAMILIES)
    for name in tqdm(chosen, unit="family"):
        row: dict[str, Any] = {"family": name}
        for side in SIDES:
            row[side] = _attempt_in_process(name, side)
        rows.append(row)
    if write:
        save("families", rows, r=RANK, rho=RHO, batches=BATCHES, most_forwards=MAX_FORWARDS)
    return rows


def _attempt_in_process(name: str, side: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.families.run", name, side]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"stage": "initialise", "error": f"did not end within {SECONDS} seconds"}
    if done.returncode:
        return {"stage": "initialise", "error": f"the process exited with status {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    return result


def outcome_text(outcome: dict[str, Any]) -> str:
    """Return an outcome as the cell of a table."""
    if outcome["stage"] is None:
        return "works"
    stage = {"initialise": "", "train": "training: ", "reload": "reload: "}[outcome["stage"]]
    return f"{stage}`{outcome['error']}`".replace("|", "\\|")


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(json.dumps(attempt(sys.argv[1], sys.argv[2])))

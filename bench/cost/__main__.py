"""The process of one row: ``python -m bench.cost QUESTION`` measures a method, prints the row."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from eva_peft.errors import first_line

from ..common import synchronized_now
from ..meter import Meter
from ..methods import METHODS, Batch, Method, after_step, lora_layers, rank_of
from .configs import CONFIGS, Config, causal_loss, warm_up_model

TRAIN_STEPS = 3  # of the first repetition; all but the first step are timed


def measure_method(question: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one method.

    Args:
        question: ``config``, ``method``, ``batch`` and ``real`` (use the hub's weights); optionally
            ``depth``, the number of layers, and ``repeats``, to override the configuration.

    Returns:
        ``warm_up_s``; ``runs``, a list with seconds and bytes by phase of every repetition; and the
        effect of the first repetition on the model.
    """
    config, method = CONFIGS[question["config"]], METHODS[question["method"]]
    if "depth" in question:
        config = config.with_depth(question["depth"])
    device, begin = config.device(), time.perf_counter()
    _warm_up(method, config, device)
    warm_up_seconds = time.perf_counter() - begin
    result: dict[str, Any] = {"warm_up_s": warm_up_seconds, "runs": []}
    max_runs, spent_seconds = question.get("repeats", config.repeats), 0.0
    while (num_runs := len(result["runs"])) < max_runs:
        if num_runs >= config.min_repeats and spent_seconds >= config.seconds:
            break
        begin = time.perf_counter()
        steps = 1 if num_runs else TRAIN_STEPS
        run, adapted = _run_once(config, method, question, device, steps)
        spent_seconds += time.perf_counter() - begin
        result["runs"].append(run)
        if len(result["runs"]) == 1:
            result |= _effect_on_model(adapted, config, question["real"], device)
        del adapted
        gc.collect()
    return result


def _warm_up(method: Method, config: Config, device: torch.device) -> None:
    ids = torch.arange(2 * 48, device=device).view(2, 48) % 64
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    job = config.job([batch, batch])
    adapted = method.start(warm_up_model(device, config.dtype), job, Meter(device))
    _train(adapted, [batch], Meter(device))
    gc.collect()


def _run_once(
    config: Config, method: Method, question: Mapping[str, Any], device: torch.device, steps: int
) -> tuple[dict[str, Any], PeftModel]:
    load_meter = Meter(device)
    with load_meter.phase("load"):
        model = config.make_model(question["real"])
        batches = config.make_batches(question["batch"], device)
    train_batches = config.make_batches(config.train_batch, device)[:steps]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    meter = Meter(device)
    adapted = method.start(model, config.job(batches), meter)
    gc.collect()
    init_seconds = dict(meter.seconds)
    step_seconds = _train(adapted, train_batches, meter)
    run = {
        "seconds": {
            **load_meter.seconds,
            **init_seconds,
            "first step": meter.seconds["first step"],
        },
        "peaks": meter.peaks,
        "reserved": meter.reserved,
        "init_peak": max((meter.peaks.get(name, 0) for name in init_seconds), default=0),
        "init_reserved": max((meter.reserved.get(name, 0) for name in init_seconds), default=0),
        "forwards": meter.forwards,
        "tokens": meter.tokens,
        "train_step_s": step_seconds,
    }
    return run, adapted


def _train(model: PeftModel, batches: list[Batch], meter: Meter) -> float:
    """Train one step per batch; return the median seconds of the steps after the first."""
    model.train()
    seconds = []
    for step, batch in enumerate(batches, 1):
        with meter.phase("first step" if step == 1 else "steps"):
            begin = time.perf_counter()
            if step == 1:
                trained = [p for p in model.parameters() if p.requires_grad]
                optimizer = torch.optim.AdamW(trained, lr=1e-3)
            optimizer.zero_grad()
            causal_loss(model, batch).backward()
            optimizer.step()
            after_step(model, step)
            seconds.append(synchronized_now(meter.device) - begin)
    return sorted(seconds[1:])[len(seconds[1:]) // 2] if seconds[1:] else seconds[0]


@torch.no_grad()
def _effect_on_model(
    model: PeftModel, config: Config, use_hub_weights: bool, device: torch.device
) -> dict[str, Any]:
    """Return the effect of a method on the model, compared with a fresh base."""
    fresh = config.make_model(use_hub_weights)
    fresh_modules = dict(fresh.named_modules())
    changed = total = 0.0
    for name, layer in lora_layers(model).items():
        old_weight = fresh_modules[name.removeprefix("base_model.model.")].weight.float()
        new_weight = layer.get_base_layer().weight.float()
        changed += float((new_weight - old_weight).square().sum())
        total += float(old_weight.square().sum())
    ranks = [rank_of(layer) for layer in lora_layers(model).values()]
    return {
        "weights_changed": (changed / total) ** 0.5 if total else 0.0,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "ranks": sum(ranks),
        "layers": len(ranks),
        **_reload_difference(model, fresh, config.make_batches(2, device)[0]["input_ids"]),
    }


def _reload_difference(model: PeftModel, fresh: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Save the briefly trained adapter, load it on a fresh base, and compare logits."""
    model.eval()
    expected = model(input_ids=ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            reloaded = PeftModel.from_pretrained(fresh, folder).eval()
        except Exception as error:  # the failure is the result
            return {"reload_error": f"{type(error).__name__}: {first_line(error)[:120]}"}
        logits = reloaded(input_ids=ids, use_cache=False).logits
    return {"reload_difference": float((logits - expected).abs().max())}


def main() -> None:
    """Answer the question on the command line."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    sys.stdout.write("\n" + json.dumps(measure_method(json.loads(sys.argv[1]))) + "\n")


if __name__ == "__main__":
    main()

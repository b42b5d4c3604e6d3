"""Warnings and errors at the end of a pass, before its result is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import EvaValueError, NotConvergedError, NotConvergedWarning, counted, listed, warn

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass

__all__ = ["check_answer"]

_BACKWARDS = (
    "because the weights are stored as (in, out), and PEFT's lora_A multiplies the other side"
)


_IDLE = (
    "If the model uses a layer's weight without calling the layer, as nn.MultiheadAttention does "
    "with its out_proj, an adapter there has no effect: name such layers in exclude_modules (to "
    "adapt the attention, name it itself in target_modules). If fused kernels replace layer and "
    "adapter, as unsloth's do, initialise before they are put in, or calibrate the base model "
    "without them and apply the result to this one"
)


def check_answer(run: CalibrationPass, done: bool) -> None:
    """Warn of layers that EVA cannot initialise, and of those that have not converged.

    Args:
        run: the finished pass.
        done: every layer has converged.

    Raises:
        EvaValueError: there is no layer to initialise.
        NotConvergedError: with ``on_not_converged="raise"``.
    """
    backwards = [run.targets[i].name for i in sorted(run.collector.routed.backwards)]
    _check_any(run, backwards)
    if backwards:
        layers = counted(len(backwards), "layer keeps", "layers keep")
        warn(f"{layers} the default initialisation, {_BACKWARDS}: {listed(backwards)}")
    left = [name for name in run.uncalled if name not in set(backwards)]
    known = {*run.collector.most_calls, *(i for i, t in enumerate(run.targets) if t.weight)}
    called = {run.targets[i].name for i in known}  # experts count: they may just get no tokens
    masked, idle = [n for n in left if n in called], [n for n in left if n not in called]
    if masked:
        warn(_left(masked, "never called with a token that counts"))
    if idle:
        warn(f"{_left(idle, 'never called')}. {_IDLE}")
    _check_directions(run)
    if not done and run.options.on_not_converged != "ignore":
        _judge_convergence(run)


def _left(names: list[str], why: str) -> str:
    layers, keep = ("layer was", "keeps") if len(names) == 1 else ("layers were", "keep")
    told = f"{len(names)} {layers} {why} and {keep} the default initialisation"
    return f"{told}: {listed(names)}"


def _check_any(run: CalibrationPass, backwards: list[str]) -> None:
    every = len(run.targets)
    if len(backwards) == every:
        raise EvaValueError(
            f"EVA can initialise none of the {counted(every, 'layer')}, {_BACKWARDS}; adapt "
            "others, by target_modules"
        )
    if len(run.uncalled) < every:
        return
    were = ("token with NaN or infinity was", "tokens with NaN or infinity were")
    skipped = f"; {counted(run.skipped, *were)} left out" if run.skipped else ""
    advice = f"check the attention and label masks of the loader{skipped}"
    if not run.collector.most_calls:
        advice = f"none of them was called. {_IDLE}"
    raise EvaValueError(
        f"no token reached any of the {counted(every, 'target layer')} in "
        f"{counted(run.forwards, 'forward pass', 'forward passes')}; {advice}"
    )


def _check_directions(run: CalibrationPass) -> None:
    """Warn if the data have far fewer directions than there are ranks to distribute."""
    budget = sum(run.targets[i].rank for i in run.ranks)
    given = sum(run.ranks.values())
    if run.options.budget == "rank" and 0 < 2 * given < budget:
        warn(
            f"only {given} of {budget} ranks could be given: the {run.tokens} tokens read have no "
            "more directions in the layers' inputs. Give more, and different, samples"
        )


def _judge_convergence(run: CalibrationPass) -> None:
    slots = run.collector.slots
    missing = [run.targets[i].name for s in slots if not s.stream.converged for i in s.members]
    if not missing:
        return
    message = (
        f"{len(missing)} of {counted(len(run.targets), 'layer')} "
        f"{'has' if len(missing) == 1 else 'have'} not converged after "
        f"{counted(run.forwards, 'forward pass', 'forward passes')}, "
        f"{counted(run.tokens, 'token')}: {listed(missing)}. The best estimate is used; raise "
        "max_steps, give more data, or lower tau"
    )
    if run.options.on_not_converged == "raise":
        raise NotConvergedError(message)
    warn(message, NotConvergedWarning)

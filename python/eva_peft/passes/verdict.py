"""Warnings and errors at the end of a pass, before its result is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import EvaValueError, NotConvergedError, NotConvergedWarning, counted, listed, warn

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass

__all__ = ["check_outcome"]

_TRANSPOSED_WEIGHTS = (
    "because the weights are stored as (in, out), so PEFT's lora_A has the size of the output, "
    "whereas EVA computes components of the input"
)


_NEVER_CALLED_ADVICE = (
    "If the model uses a layer's weight without calling the layer, as nn.MultiheadAttention does "
    "with its out_proj, an adapter there has no effect: name such layers in exclude_modules (to "
    "adapt the attention, name it itself in target_modules). If fused kernels replace layer and "
    "adapter, as unsloth's do, initialise before they are put in, or calibrate the base model "
    "without them and apply the result to this one"
)


def check_outcome(run: CalibrationPass, converged: bool) -> None:
    """Warn of layers that EVA cannot initialise, and of those that have not converged.

    Args:
        run: the finished pass.
        converged: every layer has converged.

    Raises:
        EvaValueError: there is no layer to initialise.
        NotConvergedError: with ``on_not_converged="raise"``.
    """
    transposed = [run.targets[i].name for i in sorted(run.collector.routed.transposed_layers)]
    _check_any_initialised(run, transposed)
    if transposed:
        layers = counted(len(transposed), "layer keeps", "layers keep")
        warn(f"{layers} the default initialisation, {_TRANSPOSED_WEIGHTS}: {listed(transposed)}")
    uncalled = [name for name in run.uncalled if name not in set(transposed)]
    experts = {i for i, t in enumerate(run.targets) if t.weight}  # they may just get no tokens
    called = {run.targets[i].name for i in experts | set(run.collector.max_calls)}
    masked = [name for name in uncalled if name in called]
    never_called = [name for name in uncalled if name not in called]
    if masked:
        warn(_default_kept_message(masked, "never called with a token that counts"))
    if never_called:
        warn(f"{_default_kept_message(never_called, 'never called')}. {_NEVER_CALLED_ADVICE}")
    _warn_of_few_directions(run)
    if not converged and run.options.on_not_converged != "ignore":
        _report_unconverged(run)


def _default_kept_message(names: list[str], reason: str) -> str:
    layers, keep = ("layer was", "keeps") if len(names) == 1 else ("layers were", "keep")
    message = f"{len(names)} {layers} {reason} and {keep} the default initialisation"
    return f"{message}: {listed(names)}"


def _check_any_initialised(run: CalibrationPass, transposed: list[str]) -> None:
    num_layers = len(run.targets)
    if len(transposed) == num_layers:
        raise EvaValueError(
            f"EVA can initialise none of the {counted(num_layers, 'layer')}, "
            f"{_TRANSPOSED_WEIGHTS}; choose other layers by target_modules or target_parameters"
        )
    if len(run.uncalled) < num_layers:
        return
    nouns = ("token with NaN or infinity was", "tokens with NaN or infinity were")
    skipped = f"; {counted(run.skipped_tokens, *nouns)} left out" if run.skipped_tokens else ""
    advice = f"check the attention and label masks of the loader{skipped}"
    if not run.collector.max_calls:
        advice = f"none of them was called. {_NEVER_CALLED_ADVICE}"
    raise EvaValueError(
        f"no token reached any of the {counted(num_layers, 'target layer')} in "
        f"{counted(run.forwards, 'forward pass', 'forward passes')}; {advice}"
    )


def _warn_of_few_directions(run: CalibrationPass) -> None:
    """Warn if the data have far fewer directions than there are ranks to distribute."""
    budget = sum(run.targets[i].rank for i in run.ranks)
    given = sum(run.ranks.values())
    if run.options.budget == "rank" and 0 < 2 * given < budget:
        warn(
            f"only {given} of {budget} ranks could be given: the inputs of the layers, for the "
            f"{run.tokens} tokens read, vary in no more directions. Use more, and more varied, "
            "samples"
        )


def _report_unconverged(run: CalibrationPass) -> None:
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

"""Is a model divided among processes?"""

from __future__ import annotations

from torch import nn

from .errors import EvaRuntimeError

__all__ = ["check_not_sharded", "class_names", "is_sharded", "sharded_by"]

_FSDP = frozenset(["FullyShardedDataParallel", "FSDPModule"])


def class_names(model: nn.Module) -> set[str]:
    """Return the names of all classes that a model and its parts are of."""
    return {kind.__name__ for module in model.modules() for kind in type(module).__mro__}


def sharded_by(model: nn.Module) -> str | None:
    """Return what keeps a share of each weight in every process, and whole ones while a layer runs.

    FSDP of either kind, or DeepSpeed's ZeRO-3. The processes wait for each other in every forward
    pass of such a model; the inputs of its layers are whole.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed (ZeRO-3)"
    return "FSDP" if class_names(model) & _FSDP else None


def is_sharded(model: nn.Module) -> bool:
    """Tell whether the weights of a model are sharded: see :func:`sharded_by`."""
    return sharded_by(model) is not None


def check_not_sharded(model: nn.Module) -> None:
    """Refuse a model to whose adapters nothing can be written any more.

    Raises:
        EvaRuntimeError: it is sharded, and what did that knows the parameters of then only.
    """
    kind = sharded_by(model)
    if kind is not None:
        raise EvaRuntimeError(
            f"the model is sharded by {kind}, which would not know adapters that are made or get "
            "another rank now. Initialise before sharding; or calibrate() the sharded model, and "
            "apply the result to one that is not"
        )

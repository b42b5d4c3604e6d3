"""The stages, the time reserved for each, and how unused time passes to later ones.

Stages of the check always run, further ones only if requested (``--also``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "ON_REQUEST",
    "STAGES",
    "TOTAL_SECONDS",
    "Stage",
    "select_stages",
    "time_limit",
]

TOTAL_SECONDS = 540.0


@dataclass(frozen=True)
class Stage:
    """One stage of the check.

    Attributes:
        name: also names its module in ``stages``, unless ``module`` is given.
        reserved_seconds: seconds reserved for it, whatever the stages before it take.
        rehearsal_seconds: maximum seconds in a dry run.
        required: the check passes only if this stage did; a stage that is not required may be
            skipped if the machine lacks what it needs, but must not fail.
        parallel: runs in parallel with the stage before it, and shares its time. Not for a stage
            that measures time.
        on_request: not part of the check: run only on request, and then required.
        module: in ``stages``, if several stages share it.
    """

    name: str
    reserved_seconds: float
    rehearsal_seconds: float
    required: bool = True
    parallel: bool = False
    on_request: bool = False
    module: str = ""


# In order of value: the last stages are lost first if the whole check is cut short.
STAGES = (
    Stage("build", 50.0, 90.0),
    Stage("environment", 15.0, 60.0),
    Stage("tests", 210.0, 120.0),
    Stage("sanitizer", 60.0, 10.0, required=False, parallel=True),
    Stage("quality", 310.0, 240.0, parallel=True, on_request=True),
    Stage("ceilings", 15.0, 40.0),
    Stage("kernels", 75.0, 100.0),
    Stage("end_to_end", 105.0, 120.0),
    Stage("end_to_end_8b", 45.0, 120.0, on_request=True, module="end_to_end"),
    Stage("end_to_end_70b", 75.0, 120.0, on_request=True, module="end_to_end"),
    Stage("tune", 60.0, 60.0, on_request=True),
    Stage("corda", 80.0, 240.0, on_request=True),
)
ON_REQUEST = tuple(stage.name for stage in STAGES if stage.on_request)


def select_stages(also: Sequence[str]) -> tuple[Stage, ...]:
    """Return the stages of the check, and the stages in ``also`` beyond it."""
    return tuple(stage for stage in STAGES if not stage.on_request or stage.name in also)


def time_limit(stage: Stage, later_stages: Sequence[Stage], remaining_seconds: float) -> float:
    """Return a stage's time limit: all remaining time except the shares of the stages after it.

    Args:
        stage: about to start.
        later_stages: the stages that will run after it.
        remaining_seconds: seconds left for the whole check.

    Returns:
        At least 0. If earlier stages took too long, the stage still gets its share, if that much
        is left.
    """
    spare = remaining_seconds - sum(other.reserved_seconds for other in later_stages)
    return max(0.0, min(remaining_seconds, max(spare, stage.reserved_seconds)))

"""The process of one stage: ``python -m bench.gpu_check.child STAGE --out DIR``."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import signal
import sys
import traceback
from pathlib import Path

from ..processes import exit_on_signal
from .context import Context, StageFailed, StageSkipped
from .plan import STAGES

PASSED, FAILED, SKIPPED = 0, 1, 77
# Status that a stage reports -> the matching exit status.
EXIT_STATUSES = {"passed": PASSED, "failed": FAILED, "skipped": SKIPPED}
SHARED_MODULES = {stage.name: stage.module for stage in STAGES if stage.module}
OVERTIME_SECONDS = 10  # seconds past its time limit until a stage ends itself


def run_stage(context: Context) -> int:
    """Run one stage and return the exit status for its outcome."""
    context.save({})
    try:
        name = SHARED_MODULES.get(context.stage, context.stage)
        module = importlib.import_module(f"bench.gpu_check.stages.{name}")
        module.run(context)
    except StageSkipped as skipped:
        context.save(context.saved(), "skipped", str(skipped))
        return SKIPPED
    except Exception as error:  # the parent goes on with the next stage
        if not isinstance(error, StageFailed):
            traceback.print_exc()
        name = "" if isinstance(error, StageFailed) else f"{type(error).__name__}: "
        context.save(context.saved(), "failed", f"{name}{error}")
        return FAILED
    context.save(context.saved(), "passed")
    return PASSED


def main(arguments: list[str]) -> int:
    """Parse the arguments and run the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    # Raises an exception, so that children in their own process groups are ended, too.
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, exit_on_signal)
    # In case the parent is killed and cannot end this process. The second timer is for native code
    # that does not return: Python handles no signals meanwhile.
    signal.alarm(int(options.seconds) + OVERTIME_SECONDS)
    faulthandler.dump_traceback_later(options.seconds + 2 * OVERTIME_SECONDS, exit=True)
    return run_stage(Context(options.stage, options.out, options.dry_run, options.seconds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run all scenarios in this process and save their results; started by torchrun."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import eva_kernels
from distributed import checkpoints, data_parallel, faults, shards  # noqa: F401
from distributed.scenarios import SCENARIOS


def plain(result: Any) -> Any:
    """Replace results by dictionaries of the attributes that tests compare."""
    if isinstance(result, dict):
        return {key: plain(value) for key, value in result.items()}
    if not isinstance(result, eva_kernels.EvaResult):
        return result
    names = ("ranks", "components", "singular_values", "explained_variance_ratio", "converged")
    names += ("tokens", "steps", "forwards", "shared_inputs", "uncalled", "method")
    return {name: getattr(result, name) for name in names}


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, found = distributed.get_rank(), {}
    for name, run in SCENARIOS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", "the loader", eva_kernels.EvaWarning)
                found[name] = plain(run(rank))
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
        distributed.barrier()
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

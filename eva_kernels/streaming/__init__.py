"""The method: state, fold, convergence, rank allocation, merge. Knows no model."""

from .allocation import allocate_ranks
from .plan import StreamPlan, plan_streams, stream_bytes
from .stream import InputStream, Options, Spectrum, compare_streams, fold_streams

__all__ = [
    "InputStream",
    "Options",
    "Spectrum",
    "StreamPlan",
    "allocate_ranks",
    "compare_streams",
    "fold_streams",
    "plan_streams",
    "stream_bytes",
]

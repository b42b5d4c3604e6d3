"""The method: state, fold, convergence, rank allocation, merge. Knows no model."""

from .allocation import allocate_ranks
from .convergence import compare_streams
from .plan import StreamPlan, plan_streams, stream_bytes
from .stream import InputStream, Options, Spectrum, fold_streams

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

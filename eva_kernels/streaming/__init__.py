"""The method: state, fold, convergence, rank allocation, merge. Knows no model."""

from ._host import Array, as_array
from .allocation import allocate_ranks
from .checkpoint import export_stream, restore_stream
from .convergence import compare_streams, leading_similar
from .plan import StreamPlan, answer_bytes, fold_bytes, plan_streams, stream_bytes
from .spectrum import Spectrum, leading_ratios, spectra
from .step import NonFiniteStepError, begin_fold, fold_streams
from .stream import InputStream, Options

__all__ = [
    "Array",
    "InputStream",
    "NonFiniteStepError",
    "Options",
    "Spectrum",
    "StreamPlan",
    "allocate_ranks",
    "answer_bytes",
    "as_array",
    "begin_fold",
    "compare_streams",
    "export_stream",
    "fold_bytes",
    "fold_streams",
    "leading_ratios",
    "leading_similar",
    "plan_streams",
    "restore_stream",
    "spectra",
    "stream_bytes",
]

"""The methods compared, each as a stream of tokens that can give its answer at any time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from peft.utils.incremental_pca import IncrementalPCA
from sklearn.decomposition import IncrementalPCA as ScikitIncrementalPCA
from torch import Tensor

from eva_kernels.streaming import InputStream, Options, fold_streams, plan_streams

from .. import minilm
from .exact import ExactPCA

OVERSAMPLES = (1.0, 1.5, 2.0, 3.0, 4.0)
CPU = torch.device("cpu")
# On data whose rank is below K every method here is exact up to float32 rounding.
PLANTED_RANK, PLANTED_COMPONENTS, PLANTED_FEATURES, PLANTED_TOKENS = 6, 8, 48, 96
PLANTED_LIMIT = 1e-4


@dataclass(frozen=True)
class Answer:
    """The answer of a method for the tokens so far.

    Attributes:
        components: (K, D), rows.
        ratios: explained-variance ratios, (K,) float64.
    """

    components: Tensor
    ratios: Tensor


class Running(Protocol):
    """A running method on one layer input."""

    def step(self, x: Tensor) -> object:
        """Process the tokens of a step, (N, D) float32; this is timed."""

    def answer(self) -> Answer:
        """Return the answer so far; the stream can be continued afterwards."""


@dataclass(frozen=True)
class Method:
    """One method of streaming PCA.

    Attributes:
        label: for tables and legends.
        start: ``f(features, components)`` returns a running instance.
        oversample: of a sketch; ``None`` for other methods.
    """

    label: str
    start: Callable[[int, int], Running]
    oversample: float | None = None


class _OurStream:
    """Our stream."""

    def __init__(self, features: int, components: int, method: str, oversample: float) -> None:
        plan = plan_streams([features], [components], method=method, oversample=oversample)[0]
        options = Options(plan.method)
        self.stream = InputStream(features, plan.components, plan.width, CPU, options=options)

    def step(self, x: Tensor) -> object:
        self.stream.add(x)
        return fold_streams([self.stream])

    def answer(self) -> Answer:
        found = self.stream.spectrum()
        return Answer(found.components, found.ratio)


class _PeftPCA:
    """PEFT's IncrementalPCA, with the settings and the dtype cast of its EVA hook.

    ``num_directions`` are carried from step to step; the K leading ones are the answer. EVA carries
    K.
    """

    def __init__(self, components: int, num_directions: int) -> None:
        self.components = components
        self.pca = IncrementalPCA(num_directions, copy=True, lowrank=True, lowrank_seed=42)

    def step(self, x: Tensor) -> object:
        return self.pca.partial_fit(x.to(torch.float32))

    def answer(self) -> Answer:
        k, pca = self.components, self.pca
        return Answer(pca.components_[:k], pca.explained_variance_ratio_[:k].double())


class _ScikitPCA:
    """scikit-learn's IncrementalPCA, with its defaults: a full decomposition at every step."""

    def __init__(self, components: int) -> None:
        self.pca = ScikitIncrementalPCA(components)

    def step(self, x: Tensor) -> object:
        return self.pca.partial_fit(x.numpy())

    def answer(self) -> Answer:
        ratios = torch.from_numpy(self.pca.explained_variance_ratio_)
        return Answer(torch.from_numpy(self.pca.components_), ratios.double())


def _sketch_method(oversample: float) -> Method:
    def start(features: int, components: int) -> Running:
        return _OurStream(features, components, "sketch", oversample)

    return Method(f"sketch Q = {oversample:g} K", start, oversample)


METHODS: dict[str, Method] = {
    "peft": Method("PEFT's EVA", lambda d, k: _PeftPCA(k, k)),
    "peft-2k": Method("PEFT with 2 K kept", lambda d, k: _PeftPCA(k, min(2 * k, d))),
    "scikit": Method("scikit-learn", lambda d, k: _ScikitPCA(k)),
    "gram": Method("exact Gram", lambda d, k: _OurStream(d, k, "gram", 2.0)),
    **{f"sketch-{value:g}": _sketch_method(value) for value in OVERSAMPLES},
}


def check_on_planted(method: Method) -> float:
    """Run a method on data of known low rank, and return the lost variance.

    Raises:
        ArithmeticError: the error exceeds rounding, so that timings would be meaningless.
    """
    tokens_by_step = planted_tokens()
    exact = ExactPCA(PLANTED_FEATURES)
    running = method.start(PLANTED_FEATURES, PLANTED_COMPONENTS)
    for tokens in tokens_by_step:
        exact.add(tokens)
        running.step(tokens)
    answer, truth = running.answer(), exact.solve(PLANTED_COMPONENTS)
    lost = minilm.lost_variance(answer.components, truth.covariance, truth.spectrum)
    ratio_error = float((answer.ratios - truth.ratios).abs().max())
    if not (lost <= PLANTED_LIMIT and ratio_error <= PLANTED_LIMIT):  # NaN fails, too
        raise ArithmeticError(
            f"{method.label} loses {lost:.1e} of the variance of data of rank {PLANTED_RANK}, and "
            f"its ratios are off by {ratio_error:.1e}"
        )
    return lost


def check_all(methods: Mapping[str, Method]) -> dict[str, str]:
    """Return, by method, why it must not be timed; methods that may be are not included."""
    faults = {}
    for name, method in methods.items():
        try:
            check_on_planted(method)
        except ArithmeticError as error:
            faults[name] = str(error)
    return faults


def planted_tokens(steps: int = 3) -> list[Tensor]:
    """Return steps of tokens of rank ``PLANTED_RANK`` about a mean far from zero."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(PLANTED_RANK, PLANTED_FEATURES, generator=generator)
    mean = 3 * torch.randn(PLANTED_FEATURES, generator=generator)
    scale = torch.linspace(3, 1, PLANTED_RANK)
    return [
        (torch.randn(PLANTED_TOKENS, PLANTED_RANK, generator=generator) * scale) @ mixing + mean
        for _ in range(steps)
    ]

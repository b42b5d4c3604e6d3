"""``EvaResult``: what a calibration pass found, as data that can be kept and applied later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import eva_kernels
from eva_kernels.streaming import Array, Spectrum, spectra

from ._peft_compat import LoraConfig, eva_of, versions
from .kept_config import config_from_dict, config_to_dict
from .ranks import Budget

if TYPE_CHECKING:
    from peft import PeftModel

    from .calibrate import CalibrationPass

__all__ = ["EvaResult", "collect_result"]


@dataclass(eq=False, repr=False)
class EvaResult:
    """Components, spectra and ranks of every layer, by its name in the base model.

    Attributes:
        ranks: rank given to each layer, in module order; 0 means no adapter there.
        components: (K, in_features) float32, unit rows; layers that share an input share the
            tensor.
        singular_values: (K,) float32, descending; 0 beyond the numerical rank.
        explained_variance_ratio: (K,) float32.
        converged: whether the components in use had converged.
        numerical_rank: of the input, among the K components.
        lost_variance: estimated share of the captured variance that is still missing.
        method: ``"sketch"`` or ``"gram"``.
        in_features, out_features: widths of the layer.
        base_ranks, alphas: r and LoRA alpha of the layer before redistribution.
        shared_inputs: groups of layers that read the same tensor.
        tokens: tokens used over the pass; ``skipped_tokens`` of them left out as not finite.
        steps, forwards: folds, and forward passes.
        seconds: by phase: forward, accumulate, fold, check, total.
        peak_memory_bytes: above the level before the pass: allocated on a GPU; on the CPU the
            growth of the process's high-water mark, and at least the streaming state.
        history: lists with an entry a step, by the names that ``callback`` is given, see
            :class:`CalibrateOptions`.
        metadata: JSON-able: versions, model, LoRA config, options.
        uncalled: layers that no forward pass called; they keep the default initialisation.
        rank_steps: what the ranks of a layer are multiples of, where that is not 1 (the groups of
            a convolution).
        owners: for layers that are parts of a fused parameter its name and how many parts it has.
    """

    ranks: dict[str, int]
    components: dict[str, Tensor]
    singular_values: dict[str, Tensor]
    explained_variance_ratio: dict[str, Tensor]
    converged: dict[str, bool]
    numerical_rank: dict[str, int]
    lost_variance: dict[str, float]
    method: dict[str, str]
    in_features: dict[str, int]
    out_features: dict[str, int]
    base_ranks: dict[str, int]
    alphas: dict[str, float]
    shared_inputs: list[list[str]]
    tokens: int
    skipped_tokens: int
    steps: int
    forwards: int
    seconds: dict[str, float]
    peak_memory_bytes: int
    history: dict[str, list[Any]]
    metadata: dict[str, Any]
    uncalled: list[str] = field(default_factory=list)
    rank_steps: dict[str, int] = field(default_factory=dict)
    owners: dict[str, list[Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"EvaResult({len(self.ranks)} layers, {self.tokens} tokens, {self.steps} steps)"

    @property
    def config(self) -> LoraConfig:
        """The LoRA config that the pass was made for."""
        return config_from_dict(self.metadata["lora_config"])

    def state_dict(self, whiten: bool | None = None) -> dict[str, Tensor]:
        """Return the new ``lora_A`` of every layer: name -> (rank, in_features).

        Separate, contiguous tensors that safetensors can save.

        Args:
            whiten: divide rows by the square root of their singular value; as the config of the
                pass says if ``None``.
        """
        if whiten is None:
            whiten = eva_of(self.config).whiten
        state = {}
        for name, rank in self.ranks.items():
            rows = self.components[name][:rank].clone()
            if whiten:
                rows /= self.singular_values[name][:rank, None].sqrt()
            state[name] = rows.contiguous()
        return state

    def reallocated(
        self,
        *,
        r: int | None = None,
        rho: float | None = None,
        budget: str = "rank",
        min_rank: int = 0,
    ) -> EvaResult:
        """Return a result with other ranks from the same spectra, without another pass.

        The LoRA scaling (alpha over r, or its root with rsLoRA) of every layer stays as it was:
        with another ``r`` alpha changes, too. Only a config that says not to
        (``adjust_scaling_factors=False``) keeps alpha instead.

        Args:
            r: rank of every layer before redistribution; the layers' own if ``None``.
            rho: a layer gets at most ``round(r * rho)``; that of the config if ``None``.
            budget, min_rank: as in ``initialize``.

        Raises:
            EvaValueError: more components are asked for than the pass has tracked, or a number is
                too small.
            EvaTypeError: no number.
        """
        from .reallocation import reallocate

        return reallocate(self, r, rho, budget, min_rank)

    def apply(
        self,
        model: nn.Module,
        config: LoraConfig | None = None,
        *,
        adapter_name: str = "default",
        strict: bool = True,
        overwrite_trained: bool = False,
        **allocation: Any,
    ) -> PeftModel:
        """Write the result into a model.

        Args:
            model: a PeftModel with a LoRA adapter, or a base model, which is then wrapped.
            config: for a base model; that of the pass if ``None``.
            adapter_name: which adapter of a PeftModel.
            strict: raise if the layers of the model and of the result differ.
            overwrite_trained: accept an adapter that has been trained.
            **allocation: ``r``, ``rho``, ``budget``, ``min_rank``; see :meth:`reallocated`. Whether
                the adapters are new or there already, their scaling stays as it was.

        Returns:
            The PeftModel, with this result as ``eva_result``.

        Raises:
            EvaError: layers differ, the adapter has been trained, or PEFT refuses the config;
                nothing is changed then.
        """
        from .adapters import write_result
        from .training import check_not_trained

        if not overwrite_trained:
            check_not_trained(model, adapter_name)
        result = self.reallocated(**allocation) if allocation else self
        return write_result(model, result, config, adapter_name, strict)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all; never pickle.

        Raises:
            EvaValueError: the path is that of a folder.
        """
        from .storage import save_result

        save_result(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> EvaResult:
        """Read what :meth:`save` wrote.

        Raises:
            EvaValueError: not such a file, or damaged.
        """
        from .storage import load_result

        return load_result(path)

    def summary(self) -> str:
        """Return a table as text: one line a kind of layer, and the totals."""
        from .storage import summary_text

        return summary_text(self)

    def plot(self, path: str | PathLike[str]) -> None:
        """Write ranks, explained variance and convergence as a PNG or SVG, by the path's suffix.

        Raises:
            EvaValueError: another suffix. ImportError: matplotlib is not installed.
        """
        from .plots import save_result_plot

        save_result_plot(self, path)

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write one self-contained HTML report.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .report import write_html

        write_html(self, path)


def collect_result(run: CalibrationPass, peak_bytes: int) -> EvaResult:
    """Build the result of a finished pass."""
    slots = run.collector.slots
    called = [i for i in range(len(run.targets)) if i in run.collector.slot_of]
    pairs = [(run.targets[i], run.collector.slot_of[i]) for i in called]
    answers = spectra([s.stream for s in slots], torch.device("cpu"))
    found = dict(zip(map(id, slots), answers, strict=True))
    tensors = dict(zip(map(id, slots), _tensors(answers), strict=True))
    limited = {
        t.name: [_leading(part, run.limits[i]) for part in tensors[id(s)]]
        for i, (t, s) in zip(called, pairs, strict=True)
    }
    # An exact stream answers by eigen-decomposition, so the ranks come from the final spectra; in
    # single precision, as the result holds them, so that ``reallocated`` decides alike.
    single = {key: a.ratios.astype(np.float32).astype(np.float64) for key, a in found.items()}
    ratios = [single[id(s)][: run.limits[i]] for i, (_, s) in zip(called, pairs, strict=True)]
    budget = Budget([t for t, _ in pairs], run.options.budget, run.options.min_rank)
    ranks = budget.spend(ratios)
    return EvaResult(
        ranks={t.name: r for (t, _), r in zip(pairs, ranks, strict=True)},
        components={name: parts[0] for name, parts in limited.items()},
        singular_values={name: parts[1] for name, parts in limited.items()},
        explained_variance_ratio={name: parts[2] for name, parts in limited.items()},
        converged={t.name: s.stream.converged for t, s in pairs},
        numerical_rank={t.name: found[id(s)].rank for t, s in pairs},
        lost_variance={t.name: found[id(s)].lost for t, s in pairs},
        method={t.name: s.stream.options.method for t, s in pairs},
        in_features={t.name: t.in_features for t, _ in pairs},
        out_features={t.name: t.out_features for t, _ in pairs},
        base_ranks={t.name: t.rank for t, _ in pairs},
        alphas={t.name: t.alpha for t, _ in pairs},
        shared_inputs=[
            [run.targets[i].name for i in sorted(s.members)] for s in slots if len(s.members) > 1
        ],
        tokens=run.tokens,
        skipped_tokens=run.skipped,
        steps=run.steps,
        forwards=run.forwards,
        seconds=dict(run.seconds),
        peak_memory_bytes=max(peak_bytes, sum(s.stream.nbytes for s in slots)),
        history=run.history,
        metadata=_metadata(run),
        uncalled=[t.name for i, t in enumerate(run.targets) if i not in run.collector.slot_of],
        rank_steps={t.name: t.step for t, _ in pairs if t.step > 1},
        owners={t.name: [t.owner, t.experts] for t, _ in pairs if t.owner},
    )


def _tensors(answers: Sequence[Spectrum]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return components, singular values and ratios, float32, each in memory of its own."""
    components = [answer.components.float() for answer in answers]
    numbers = [_as_single([a.values for a in answers]), _as_single([a.ratios for a in answers])]
    return zip(components, *numbers, strict=True)


def _as_single(arrays: Sequence[Array]) -> Sequence[Tensor]:
    whole = torch.from_numpy(np.concatenate(arrays)).float()
    # one call for all layers
    parts: Sequence[Tensor] = torch.ops.aten.split_with_sizes_copy(whole, list(map(len, arrays)))
    return parts


def _leading(part: Tensor, count: int) -> Tensor:
    """Return the first entries; the tensor itself, which layers share, where these are all."""
    return part if len(part) == count else part[:count]


def _metadata(run: CalibrationPass) -> dict[str, Any]:
    config = run.architecture.config
    parameter = next(iter(run.model.parameters()), None)
    names = ("method", "oversample", "criterion", "budget", "min_rank", "precision", "seed")
    return {
        "eva_kernels": eva_kernels.__version__,
        "versions": versions(),
        "model": getattr(config, "_name_or_path", "") or type(run.model).__name__,
        "model_type": getattr(config, "model_type", None),
        "dtype": str(None if parameter is None else parameter.dtype).removeprefix("torch."),
        "device": str(run.device),
        "lora_config": config_to_dict(run.config),
        "options": {name: getattr(run.options, name) for name in names},
    }

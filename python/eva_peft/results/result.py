"""``EvaResult``: the result of a calibration pass, which can be saved and applied later."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .._peft_compat import LoraConfig, eva_config_of
from ..errors import counted
from .config_json import config_from_dict

__all__ = ["EvaResult"]


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
        lost_variance: share of the captured variance that the last whole step still gained; 0
            if the answer is exact. After many steps on a flat spectrum the true loss is larger.
        method: ``"sketch"`` or ``"gram"``.
        in_features, out_features: widths of the layer.
        base_ranks, alphas: r and LoRA alpha of the layer before redistribution.
        shared_inputs: groups of layers that read the same tensor.
        tokens: tokens used over the pass; ``skipped_tokens`` of them left out as not finite.
        steps, forwards: number of folds, and of forward passes.
        seconds: by phase: forward, accumulate, fold, check, total.
        peak_memory_bytes: above the level before the pass: allocated on a GPU; on the CPU the
            growth of the process's high-water mark, and at least the streaming state.
        history: lists with one entry per step, by the names that ``callback`` gets, see
            :class:`eva_peft.CalibrateOptions`.
        metadata: JSON-able: versions, model, LoRA config, options.
        uncalled: layers that keep the default initialisation: no forward pass called them with an
            unmasked token, or their weights are stored transposed.
        rank_steps: the number that a layer's ranks are multiples of, if not 1 (the groups of a
            convolution).
        owners: for layers that are parts of a fused parameter, its name and number of parts.
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
        counts = {"layer": len(self.ranks), "token": self.tokens, "step": self.steps}
        return f"EvaResult({', '.join(counted(count, what) for what, count in counts.items())})"

    @property
    def config(self) -> LoraConfig:
        """The LoRA config that the pass was made for."""
        return config_from_dict(self.metadata["lora_config"])

    def state_dict(self, whiten: bool | None = None) -> dict[str, Tensor]:
        """Return the new ``lora_A`` of every layer: name -> (rank, in_features).

        Separate, contiguous tensors that safetensors can save.

        Args:
            whiten: divide rows by the square root of their singular value, as PEFT does, which
                grows with the number of tokens; ``None`` takes it from the config of the pass. Rows
                with singular value 0, which an expert that got few tokens may have, are not
                divided.
        """
        if whiten is None:
            whiten = eva_config_of(self.config).whiten
        state = {}
        for name, rank in self.ranks.items():
            rows = self.components[name][:rank].clone()
            if whiten:
                values = self.singular_values[name][:rank, None]
                rows /= torch.where(values > 0, values, 1.0).sqrt()
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

        The LoRA scaling (alpha over r, or over its root with rsLoRA) of every layer is kept: with
        another ``r`` alpha changes, too. With ``adjust_scaling_factors=False`` in the config alpha
        is kept instead.

        Args:
            r: rank of every layer before redistribution; the layers' own if ``None``.
            rho: a layer gets at most ``round(r * rho)``; that of the config if ``None``.
            budget, min_rank: as in ``initialize``.

        Raises:
            EvaValueError: more components are needed than the pass has tracked, or a number is
                too small.
            EvaTypeError: not a number.
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
    ) -> Any:
        """Write the result into a model.

        Args:
            model: a PeftModel, or another model with a LoRA adapter; or a base model, which is
                then wrapped.
            config: for a base model; that of the pass if ``None``.
            adapter_name: which adapter of a PeftModel.
            strict: raise if the layers of the model and of the result differ.
            overwrite_trained: accept an adapter that has been trained.
            **allocation: ``r``, ``rho``, ``budget``, ``min_rank``; see :meth:`reallocated`. The
                scaling of new and of existing adapters is kept.

        Returns:
            The PeftModel, or the model with adapters of its own, with this result as
            ``eva_result``.

        Raises:
            EvaError: layers differ, the adapter has been trained, an option does not exist, or
                PEFT refuses the config; nothing is changed then.
        """
        from ..lora.adapters import write_result
        from ..lora.training import check_not_trained
        from ..model.checks import warn_if_inside_peft_model
        from ..model.divided import check_adapters_writable
        from ..model.wrappers import unwrap
        from ..options import check_option_names
        from .reallocation import ALLOCATION_OPTIONS

        check_option_names(allocation, ALLOCATION_OPTIONS)
        check_adapters_writable(model)
        if not overwrite_trained:
            check_not_trained(model, adapter_name)
        warn_if_inside_peft_model(unwrap(model), config)
        result = self.reallocated(**allocation) if allocation else self
        return write_result(model, result, config, adapter_name, strict)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, atomically; never pickle.

        Raises:
            EvaValueError: the path is a folder.
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
        """Return a table as text: one line per kind of layer, and the totals."""
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

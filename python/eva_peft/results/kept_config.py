"""A LoRA config to JSON, and back."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from .._peft_compat import EvaConfig, LoraConfig
from ..errors import EvaValueError
from ..model.checks import plain_number

__all__ = ["LEFT_OUT", "config_from_dict", "config_to_dict"]

# Not kept: fields that PEFT sets itself, runtime settings, and configs of other initialisations.
# ``eva_config`` has its own entry.
LEFT_OUT = frozenset(
    [
        "peft_type",
        "auto_mapping",
        "peft_version",
        "runtime_config",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
        "eva_config",
    ]
)
# Always kept, for readers of a file; other fields only if they differ from the default.
_ALWAYS = ("r", "lora_alpha", "target_modules")


def config_to_dict(config: LoraConfig) -> dict[str, Any]:
    """Return the settings that an adapter is built from, JSON-able."""
    kept = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        if field.name in LEFT_OUT or value is None:
            continue
        if field.name in _ALWAYS or value != _default(field):
            kept[field.name] = _plain(value)
    eva = config.eva_config
    kept["eva_config"] = None if eva is None else {k: _plain(v) for k, v in vars(eva).items()}
    return kept


def config_from_dict(values: dict[str, Any]) -> LoraConfig:
    """Rebuild the config from :func:`config_to_dict`, without the fields that it leaves out.

    Raises:
        EvaValueError: a field that the installed PEFT does not know.
    """
    fields = dict(values)
    eva, init = fields.pop("eva_config", None), fields.pop("init_lora_weights", True)
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(LoraConfig)})
    if unknown:
        raise EvaValueError(
            f"the LoRA config of the result sets {', '.join(unknown)}, which the installed PEFT "
            "does not know; install a newer one, or pass a config of your own"
        )
    hints = typing.get_type_hints(LoraConfig)
    config = LoraConfig(**{name: _built(value, hints[name]) for name, value in fields.items()})
    # Set afterwards: PEFT warns about an eva_config next to another initialisation.
    config.init_lora_weights = init
    config.eva_config = None if eva is None else EvaConfig(**eva)
    return config


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    value = plain_number(value)
    return getattr(value, "value", value) if type(value).__module__.startswith("peft") else value


def _built(value: Any, hint: Any) -> Any:
    """Rebuild the PEFT config that a dict was made from, if the field has one."""
    kinds: list[Any] = [*filter(dataclasses.is_dataclass, typing.get_args(hint) or [hint])]
    return kinds[0](**value) if isinstance(value, dict) and kinds else value

"""A LoRA config to JSON, and back."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from .._peft_compat import EvaConfig, LoraConfig
from ..errors import EvaValueError
from ..model.checks import plain_number

__all__ = ["OMITTED_FIELDS", "config_from_dict", "config_to_dict"]

# Not kept: fields that PEFT sets itself, runtime settings, and configs of other initialisations.
# ``eva_config`` has its own entry.
OMITTED_FIELDS = frozenset(
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
_ALWAYS_SAVED = ("r", "lora_alpha", "target_modules")


def config_to_dict(config: LoraConfig) -> dict[str, Any]:
    """Return the settings that an adapter is built from, JSON-able."""
    fields, default = {}, LoraConfig()
    for name in (field.name for field in dataclasses.fields(config)):
        value = getattr(config, name, None)
        if name in OMITTED_FIELDS or value is None:
            continue
        if name in _ALWAYS_SAVED or value != getattr(default, name, None):
            fields[name] = _to_plain(value)
    eva = config.eva_config
    fields["eva_config"] = None if eva is None else {k: _to_plain(v) for k, v in vars(eva).items()}
    return fields


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
            "does not know; install a newer PEFT, or pass a config of your own"
        )
    hints = typing.get_type_hints(LoraConfig)
    config = LoraConfig(**{name: _rebuild(value, hints[name]) for name, value in fields.items()})
    # Set afterwards: PEFT warns about an eva_config next to another initialisation.
    config.init_lora_weights = init
    config.eva_config = None if eva is None else EvaConfig(**eva)
    return config


def _to_plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    value = plain_number(value)
    return getattr(value, "value", value) if type(value).__module__.startswith("peft") else value


def _rebuild(value: Any, hint: Any) -> Any:
    """Rebuild the PEFT config that a dict was made from, if the field has one."""
    config_classes: list[Any] = [*filter(dataclasses.is_dataclass, typing.get_args(hint) or [hint])]
    return config_classes[0](**value) if isinstance(value, dict) and config_classes else value

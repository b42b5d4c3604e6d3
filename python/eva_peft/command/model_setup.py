"""The model and the LoRA config that `eva-kernels init` is asked for.

Nothing heavy is imported before it is needed, see ``cli.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EvaValueError, first_line, warn

if TYPE_CHECKING:
    from peft import LoraConfig


class DType(str, Enum):
    """The data type of the model's weights during the pass; `auto` is that of the checkpoint."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Task(str, Enum):
    """What the model is loaded for."""

    CAUSAL_LM = "causal-lm"
    SEQ2SEQ_LM = "seq2seq-lm"
    MASKED_LM = "masked-lm"
    SEQUENCE_CLASSIFICATION = "sequence-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    QUESTION_ANSWERING = "question-answering"
    FEATURE_EXTRACTION = "feature-extraction"


# Task -> (class of transformers, PEFT's task type)
_TASKS = {
    Task.CAUSAL_LM: ("AutoModelForCausalLM", "CAUSAL_LM"),
    Task.SEQ2SEQ_LM: ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    Task.MASKED_LM: ("AutoModelForMaskedLM", None),
    Task.SEQUENCE_CLASSIFICATION: ("AutoModelForSequenceClassification", "SEQ_CLS"),
    Task.TOKEN_CLASSIFICATION: ("AutoModelForTokenClassification", "TOKEN_CLS"),
    Task.QUESTION_ANSWERING: ("AutoModelForQuestionAnswering", "QUESTION_ANS"),
    Task.FEATURE_EXTRACTION: ("AutoModel", "FEATURE_EXTRACTION"),
}


def parse_target_modules(names: str | None) -> str | list[str] | None:
    """Return the modules in a comma-separated option."""
    if names is None or names == "all-linear":
        return names
    modules = [name.strip() for name in names.split(",") if name.strip()]
    if not modules:
        raise EvaValueError(
            f"--target-modules {names!r} names no module; give names separated by commas, or "
            "leave the option out for all linear layers"
        )
    return modules


def check_device(name: str | None) -> None:
    """Refuse a device that is not available, before anything is loaded."""
    if name is None:
        return
    import torch

    try:
        torch.empty(0, device=name)
    except (AssertionError, ImportError, RuntimeError) as error:
        raise EvaValueError(f"--device {name} cannot be used: {first_line(error)}") from error


def config_fields(
    path: Path | None, lora: Mapping[str, Any], eva: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge the config file with the options that were given; options override the file."""
    fields: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise EvaValueError(f"--config: there is no file {path}")
        try:
            fields = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise EvaValueError(f"--config {path} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise EvaValueError(f"--config {path} must hold a JSON object")
    peft_type = fields.pop("peft_type", "LORA")
    if peft_type != "LORA":
        raise EvaValueError(
            f"--config {path} is a config for {peft_type}; EVA initialises LoRA adapters only "
            "(peft_type LORA)"
        )
    init_method = fields.pop("init_lora_weights", True)
    if init_method not in (True, "eva"):
        raise EvaValueError(
            f"--config {path} sets init_lora_weights={init_method!r}; set it to 'eva', or leave "
            "it out"
        )
    eva_fields = fields.get("eva_config") or {}
    if not isinstance(eva_fields, dict):
        raise EvaValueError(f"--config {path}: eva_config must be a JSON object")
    fields["eva_config"] = {
        **eva_fields,
        **{name: value for name, value in eva.items() if value is not None},
    }
    fields |= {name: value for name, value in lora.items() if value is not None}
    if fields.get("target_modules") is None and not fields.get("target_parameters"):
        fields["target_modules"] = "all-linear"
    return {"r": 16, "lora_alpha": 16, **fields}


def task_of(fields: Mapping[str, Any]) -> Task:
    """Return the task that a config names by PEFT's task type."""
    task_type = fields.get("task_type")
    task_by_peft_type = {peft_type: task for task, (_, peft_type) in _TASKS.items() if peft_type}
    if task_type is not None and task_type not in task_by_peft_type:
        raise EvaValueError(
            f"--config: task_type={task_type!r} is unknown; pass --task, or use one of "
            f"{', '.join(task_by_peft_type)}"
        )
    return Task.CAUSAL_LM if task_type is None else task_by_peft_type[task_type]


def lora_config(fields: dict[str, Any], task: Task) -> LoraConfig:
    """Build the config from the fields that :func:`config_fields` merged."""
    import dataclasses

    from peft import EvaConfig, LoraConfig

    known = {
        "LoraConfig": [field.name for field in dataclasses.fields(LoraConfig) if field.init],
        "EvaConfig": [field.name for field in dataclasses.fields(EvaConfig)],
    }
    for name, values in (("LoraConfig", fields), ("EvaConfig", fields["eva_config"])):
        unknown = sorted(set(values) - set(known[name]))
        if unknown:
            raise EvaValueError(f"--config: {name} has no field {', '.join(map(repr, unknown))}")
    task_type = _TASKS[task][1]
    fixed = {"task_type": task_type, "inference_mode": False, "init_lora_weights": "eva"}
    try:
        fixed["eva_config"] = EvaConfig(**fields["eva_config"])
        return LoraConfig(**{**fields, **fixed})
    except (TypeError, ValueError) as error:
        raise EvaValueError(f"PEFT rejects the LoRA config: {error}") from error


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model; loaded first, so it checks the model's name, too."""
    path = Path(name)
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise EvaValueError(
            f"there is no folder {name}; pass the folder of a saved model, or its name on the "
            "Hugging Face Hub"
        )
    transformers = import_module("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    # transformers 4 asks for protobuf; tokenizers written in Python fail on missing files
    except (OSError, ValueError, ImportError, TypeError) as error:
        if not path.is_dir():
            raise
        raise EvaValueError(
            f"{name} has no tokenizer that can be loaded ({first_line(error)}); save the model's "
            "tokenizer there, with tokenizer.save_pretrained"
        ) from error
    if not _has_regular_tokens(tokenizer):  # transformers 5.2 makes such if it finds no files
        raise EvaValueError(
            f"{name} has no tokenizer that can be loaded (transformers finds special tokens "
            "only); save the model's tokenizer there, with tokenizer.save_pretrained"
        )
    return tokenizer


def _has_regular_tokens(tokenizer: Any) -> bool:
    try:
        vocabulary = set(tokenizer.get_vocab())
        added_tokens = tokenizer.added_tokens_decoder.values()
    except (AttributeError, NotImplementedError):  # a model's own tokenizer, or Mistral's
        return True
    # other added tokens are words
    special = {str(token) for token in added_tokens if token.special}
    return bool(vocabulary - special - {*tokenizer.all_special_tokens})


def load_model(
    name: str, task: Task, dtype: str, device: str | None, device_map: str | None, seed: int
) -> Any:
    """Return a model for a task, on its device."""
    import torch
    import transformers

    from ..surroundings.devices import accelerator

    # Heads missing from the checkpoint, and adapters that EVA does not write, start at random.
    torch.manual_seed(seed)
    options: dict[str, Any] = {"dtype": dtype}
    if device_map is not None:
        options["device_map"] = device_map
    loader = getattr(transformers, _TASKS[task][0])
    try:
        model = loader.from_pretrained(name, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        config = transformers.AutoConfig.from_pretrained(name)
        fitting_tasks = [
            other.value
            for other, (auto, _) in _TASKS.items()
            if type(config) in getattr(getattr(transformers, auto), "_model_mapping", ())
        ]
        raise EvaValueError(
            f"{name} is a {config.model_type} model, which --task {task.value} cannot load; tasks "
            f"that can: {', '.join(fitting_tasks) or 'none'}"
        ) from error
    if device_map is None:
        model = model.to(device or accelerator() or "cpu")
    return model


def needs_decoder_inputs(model: Any, task: Task) -> bool:
    """Tell whether a model also needs tokens for its decoder."""
    tasks = (Task.SEQ2SEQ_LM, Task.FEATURE_EXTRACTION)
    return task in tasks and bool(getattr(model.config, "is_encoder_decoder", False))


def warn_of_unknown_targets(names: str | set[str] | None, model: Any) -> None:
    """Warn of target modules that the model does not have: PEFT ignores them silently."""
    if names is None or isinstance(names, str):
        return
    dotted_names = [f".{name}" for name, _ in model.named_modules()]
    unknown = sorted(n for n in names if not any(name.endswith(f".{n}") for name in dotted_names))
    if 0 < len(unknown) < len(names):  # if all are unknown there is an error
        warn(
            f"target_modules names {', '.join(unknown)}, but the model has no such module; the "
            "others are used"
        )

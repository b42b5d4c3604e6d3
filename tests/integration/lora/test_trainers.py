"""Trainers: one call before ``train()``, on the model that the trainer has made."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import eva_kernels
from eva_kernels import EvaCallback, EvaTypeError, NotInitializedError, NotInitializedWarning
from extras import needs
from integration.conftest import (
    QUIET,
    check_shares,
    layer_inputs,
    lora,
    lora_layers,
    lost,
    make_llama,
    text_batches,
    wrapped,
)

TRAINER_WARNINGS = "ignore:.*(pin_memory|use_cache|use_reentrant|deprecat|dataloader)"


def make_samples(count: int = 8) -> list[dict[str, Any]]:
    batches = text_batches(count, samples=2, labels=True)
    return [{k: v[i] for k, v in b.items()} for b in batches for i in range(2)]


def arguments(folder: Path, **fields: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **fields,
    }


def sample_batches() -> DataLoader[Any]:
    return DataLoader(make_samples(), batch_size=4)


def check_trained(model: nn.Module, before: dict[str, Any]) -> None:
    """Check that every adapter has changed: the optimizer held the parameters that EVA wrote."""
    for name, layer in lora_layers(model).items():
        assert layer.lora_B["default"].weight.any(), name
        assert not torch.equal(layer.lora_A["default"].weight, before[name]), name


def lora_a_of(model: nn.Module) -> dict[str, Any]:
    return {
        n: layer.lora_A["default"].weight.detach().clone()
        for n, layer in lora_layers(model).items()
    }


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("wrap", ["before", "by initialize"])
def test_trainer_trains_initialised_adapters(wrap: str, tmp_path: Path) -> None:
    config = lora(task_type="CAUSAL_LM")
    if wrap == "before":
        model: nn.Module = wrapped(make_llama(), config)
    else:
        loader = DataLoader(make_samples(), batch_size=4)
        model = eva_kernels.initialize(make_llama(), loader, config, max_steps=6, **QUIET)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path)),
        train_dataset=make_samples(),
        callbacks=[EvaCallback("raise")],
    )
    if wrap == "before":
        loader = trainer.get_train_dataloader()
        same = eva_kernels.initialize(trainer.model, loader, max_steps=6, **QUIET)
        assert same is trainer.model
    before = lora_a_of(trainer.model)
    trainer.train()
    check_trained(trainer.model, before)
    found = losses(trainer)
    assert found[-1] < found[0]


@pytest.mark.filterwarnings("ignore:.*not converged:eva_kernels.NotConvergedWarning")
def test_callback_of_the_readme(tmp_path: Path) -> None:
    """With a trainer made elsewhere, and adapters that started as plain LoRA."""
    text = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"TrainerCallback": TrainerCallback, "eva_kernels": eva_kernels}
    exec(
        text.partition("# where a framework makes")[2].partition("\n")[2].partition("```")[0], names
    )
    plain = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = wrapped(make_llama(), plain)
    begun: list[dict[str, Any]] = []

    class Begun(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            begun.append(lora_a_of(model))

    args = TrainingArguments(**arguments(tmp_path, gradient_accumulation_steps=2))
    callbacks = [names["InitEva"](), Begun()]
    trainer = Trainer(model=model, args=args, train_dataset=make_samples(), callbacks=callbacks)
    trainer.train()
    inputs = layer_inputs(make_llama(), sample_batches(), list(begun[0]))
    assert {len(a) for a in begun[0].values()} != {4}
    for name, a in begun[0].items():
        assert lost(a, inputs[name]) < 0.05
    check_trained(model, begun[0])


def test_trainer_with_uninitialised_adapters_warns(tmp_path: Path) -> None:
    trainer = Trainer(
        model=wrapped(make_llama(), lora(task_type="CAUSAL_LM")),
        args=TrainingArguments(**arguments(tmp_path, max_steps=1)),
        train_dataset=make_samples(),
        callbacks=[EvaCallback()],
    )
    with pytest.warns(NotInitializedWarning, match="never initialised"):
        trainer.train()


@pytest.mark.filterwarnings(TRAINER_WARNINGS)
def test_sft_trainer_trains_initialised_adapters(tmp_path: Path) -> None:
    from eva_peft.assets import load_tiny_llama

    datasets, trl = needs("datasets"), needs("trl")
    base, tokenizer = load_tiny_llama()
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 3 for i in range(16)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")
        trainer = trl.SFTTrainer(
            model=base,
            args=trl.SFTConfig(**arguments(tmp_path, max_length=64)),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            peft_config=lora(task_type="CAUSAL_LM"),
            callbacks=[EvaCallback("raise")],
        )
    loader = trainer.get_train_dataloader()
    model = eva_kernels.initialize(trainer.model, loader, max_steps=6, **QUIET)
    assert model is trainer.model
    assert all(result > 0 for result in (model.eva_result.tokens, model.eva_result.steps))
    before = lora_a_of(model)
    trainer.train()
    check_trained(model, before)
    found = losses(trainer)
    assert found[-1] < found[0]


@pytest.mark.filterwarnings(TRAINER_WARNINGS, "ignore:.*low_cpu_mem_usage")
@pytest.mark.parametrize("way", ["peft_config", "wrapped before"])
def test_dpo_trainer_resumes_with_its_reference(way: str, tmp_path: Path) -> None:
    from eva_peft.assets import load_tiny_llama

    datasets, trl = needs("datasets"), needs("trl")
    texts = [f"def f{i}(x):\n    return x + {i}" for i in range(12)]
    pairs = {"prompt": texts, "chosen": [f"\n{t}" for t in texts], "rejected": ["no"] * len(texts)}

    def make_trainer(steps: int, config: LoraConfig | None, by_hand: bool = False) -> Any:
        base, tokenizer = load_tiny_llama()
        kept = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2)
        return trl.DPOTrainer(
            model=wrapped(base, config) if by_hand else base,
            args=trl.DPOConfig(**kept, bf16=False),
            train_dataset=datasets.Dataset.from_dict(pairs),
            processing_class=tokenizer,
            peft_config=None if by_hand else config,
            callbacks=[EvaCallback("raise")],
        )

    config = lora(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    whole = make_trainer(3, config, by_hand=way == "wrapped before")
    eva_kernels.initialize(whole.model, whole.get_train_dataloader(), max_steps=3, **QUIET)
    assert {layer.r["default"] for layer in lora_layers(whole.model).values()} != {4}
    whole.train()
    config = LoraConfig.from_pretrained(tmp_path / "checkpoint-2")
    config.inference_mode = False
    again = make_trainer(3, config)
    if way == "wrapped before" and "default" not in getsource(Trainer._load_from_checkpoint):
        with pytest.raises(NotInitializedError):  # transformers 5.17 loads the reference alone
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        return
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again)[-1] == pytest.approx(losses(whole)[-1], abs=1e-5) != math.log(2)
    for name, rows in lora_a_of(whole.model).items():
        torch.testing.assert_close(lora_a_of(again.model)[name], rows)


@pytest.mark.filterwarnings(TRAINER_WARNINGS, "ignore:.*(trl.experimental|low_cpu_mem_usage)")
def test_forward_fn_runs_the_loss_of_a_trainer(tmp_path: Path) -> None:
    from eva_peft.assets import load_tiny_llama

    datasets, orpo = needs("datasets"), needs("trl.experimental.orpo", "trl")
    base, tokenizer = load_tiny_llama()
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 3) for i in range(8)]
    pairs = {"prompt": ["# code\n"] * 8, "chosen": texts, "rejected": [t[::-1] for t in texts]}
    trainer = orpo.ORPOTrainer(
        model=base,
        args=orpo.ORPOConfig(**arguments(tmp_path, max_length=64, bf16=False)),
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=tokenizer,
        peft_config=lora(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]),
    )
    batches = list(trainer.get_train_dataloader())
    options = {**QUIET, "method": "gram", "max_steps": len(batches)}
    with pytest.raises(EvaTypeError, match=r"'chosen_input_ids'.* pass forward_fn"):
        eva_kernels.calibrate(trainer.model, batches, **options)
    model = trainer.model
    result = eva_kernels.calibrate(model, batches, forward_fn=trainer.compute_loss, **options)
    parts = ("input_ids", "attention_mask")
    texts_read = [
        {p: b[f"{s}_{p}"] for p in parts} for b in batches for s in ("chosen", "rejected")
    ]
    layers = {f"base_model.model.{name}.base_layer": name for name in result.ranks}
    with model.disable_adapter():
        read = layer_inputs(model.eval(), texts_read, list(layers))
    for path, name in layers.items():
        check_shares(result, name, read[path])


@pytest.mark.filterwarnings(TRAINER_WARNINGS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*(does not have many workers|tensorboard)")
@pytest.mark.filterwarnings("ignore:GPU available but not used")  # on the CPU on purpose
def test_lightning_trains_initialised_adapters(tmp_path: Path) -> None:
    lightning = needs("lightning")

    class Task(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = wrapped(make_llama(), lora(task_type="CAUSAL_LM"))
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model(**batch).loss
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=5e-3)

    task, loader = Task(), DataLoader(make_samples(), batch_size=4)
    eva_kernels.initialize(task.model, loader, max_steps=6, **QUIET)
    before = lora_a_of(task.model)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task.train(), loader)
    check_trained(task.model, before)
    assert task.losses[-1] < task.losses[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("adapted", [True, False])
def test_fabric_wrapper_is_accepted(adapted: bool, tmp_path: Path) -> None:
    lightning = needs("lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    config = lora(task_type="CAUSAL_LM")
    model = fabric.setup_module(wrapped(make_llama(), config) if adapted else make_llama())
    loader = fabric.setup_dataloaders(sample_batches())
    inner = model.module
    found = eva_kernels.initialize(model, loader, None if adapted else config, **QUIET, max_steps=4)
    assert found is inner if adapted else found.get_base_model() is inner
    assert eva_kernels.is_initialized(model if adapted else found)
    twin = eva_kernels.initialize(make_llama(), sample_batches(), config, **QUIET, max_steps=4)
    assert found.eva_result.ranks == twin.eva_result.ranks
    found.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path)
    for name, rows_written in lora_a_of(twin).items():
        torch.testing.assert_close(lora_a_of(again)[name], rows_written)


ONE_PROCESS_SCRIPT = """
import torch
from accelerate import Accelerator
import eva_kernels
from integration.conftest import QUIET, lora, make_llama, text_batches, wrapped
accelerator = Accelerator(cpu=True)
model = wrapped(make_llama(), lora(task_type="CAUSAL_LM"))
loader = torch.utils.data.DataLoader(text_batches(6, labels=True), batch_size=None)
loader = accelerator.prepare(loader)
eva_kernels.initialize(model, loader, max_steps=4, **QUIET)
trained = [p for p in model.parameters() if p.requires_grad]
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=5e-3))
model.train()
for batch in loader:
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()
assert eva_kernels.is_initialized(model)
accelerator.print("one process:", len(trained))
"""

# Processes may share a pass, or all apply the result of one.
TWO_PROCESSES_SCRIPT = """
import sys
import torch
from accelerate import PartialState
import eva_kernels
from integration.conftest import QUIET, lora, make_llama, text_batches
state, path = PartialState(cpu=True), sys.argv[1]
texts, config = text_batches(6), lora(task_type="CAUSAL_LM")
assert state.num_processes == 2
own = texts[state.process_index :: 2]
shared = eva_kernels.calibrate(make_llama(), own, config, max_steps=3, **QUIET)
for result in (shared, eva_kernels.EvaResult.load(path)):
    model = result.apply(make_llama(), config)
    own = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_" in n])
    both = [torch.empty_like(own) for _ in range(2)]
    torch.distributed.all_gather(both, own)
    assert torch.equal(both[0], both[1])
if state.is_main_process:
    print("two processes:", own.numel())
torch.distributed.destroy_process_group()
"""


def launch(script: str, folder: Path, processes: int, *arguments: str) -> str:
    path = folder / "train.py"
    path.write_text(script)
    root = Path(__file__).parents[3]
    environment = dict(os.environ)
    parts = [root / "tests", root, root / "python", environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, parts))
    environment["OMP_NUM_THREADS"] = "1"
    if processes == 1:
        launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        launcher += ["--log-dir", str(folder / "log")]
    command = [sys.executable, "-m", *launcher, str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_accelerate_launch_of_one_process(tmp_path: Path) -> None:
    assert "one process: 28" in launch(ONE_PROCESS_SCRIPT, tmp_path, 1)


@pytest.mark.slow
def test_two_processes_get_equal_adapters(tmp_path: Path) -> None:
    config = lora(task_type="CAUSAL_LM")
    result = eva_kernels.calibrate(make_llama(), text_batches(6), config, max_steps=6, **QUIET)
    path = tmp_path / "eva.safetensors"
    result.save(path)
    assert "two processes:" in launch(TWO_PROCESSES_SCRIPT, tmp_path, 2, str(path))

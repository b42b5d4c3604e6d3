"""Models, tokenizers and configs that `eva-kernels init` sets up, and its error messages."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import AutoPeftModelForTokenClassification, PeftConfig
from peft.utils.other import ModulesToSaveWrapper
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    EsmConfig,
    PreTrainedTokenizerFast,
)

from eva_kernels import EvaValueError, initialize
from eva_peft.command.model_setup import Task, load_tokenizer, lora_config
from eva_peft.results.result import EvaResult
from integration.command.running import init, make_home, reason, run
from integration.conftest import VOCABULARY, lora, text_batches

# PEFT reads a property of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("model", ["llama", "bert"])
@pytest.mark.parametrize("task", ["token-classification", "question-answering"])
def test_task_heads_are_trained_and_not_adapted(
    home: Path, tmp_path: Path, task: str, model: str
) -> None:
    result = init(home, tmp_path / "out", "--task", task, model=model)
    assert result.exit_code == 0, result.stderr
    eva_result = EvaResult.load(tmp_path / "out" / "eva.safetensors")
    assert len(eva_result.ranks) == {"llama": 14, "bert": 12}[model]
    assert not any("classifier" in name or "outputs" in name for name in eva_result.ranks)
    saved = PeftConfig.from_pretrained(tmp_path / "out")
    assert saved.modules_to_save
    if (task, model) == ("token-classification", "bert"):
        AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "out")


def test_encoder_decoder_without_a_head(home: Path, tmp_path: Path) -> None:
    result = init(home, tmp_path / "out", "--task", "feature-extraction", model="t5")
    assert result.exit_code == 0, result.stderr
    assert not EvaResult.load(tmp_path / "out" / "eva.safetensors").uncalled


def test_model_that_a_task_cannot_load_is_named(home: Path, tmp_path: Path) -> None:
    message = reason(init(home, tmp_path / "out", model="t5"))
    assert (
        "is a t5 model, which --task causal-lm cannot load; tasks that can: seq2seq-lm" in message
    )


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/folder/deep"])
def test_missing_model_folder_is_an_error(home: Path, tmp_path: Path, name: str) -> None:
    arguments = ("--data", home / "data.jsonl", "--out", tmp_path / "out")
    message = reason(run("init", name, *arguments))
    assert message.startswith(f"error: there is no folder {name}; pass the folder of a saved model")


def test_folder_without_a_tokenizer_is_an_error(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "llama", tmp_path / "model")
    for path in (tmp_path / "model").glob("token*"):
        path.unlink()
    arguments = ("--data", home / "data.jsonl", "--out", tmp_path / "out")
    assert "has no tokenizer that can be loaded" in reason(
        run("init", tmp_path / "model", *arguments)
    )


def test_tokenizer_without_vocabulary_is_an_error(home: Path, tmp_path: Path) -> None:
    """As transformers 5.2 creates for a folder without tokenizer files."""
    shutil.copytree(home / "llama", tmp_path / "model")
    empty = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    saved = PreTrainedTokenizerFast(tokenizer_object=empty, unk_token="<unk>", eos_token="</s>")
    saved.save_pretrained(tmp_path / "model")
    arguments = ("--data", home / "data.jsonl", "--out", tmp_path / "out")
    assert "has no tokenizer that can be loaded (transformers finds" in reason(
        run("init", tmp_path / "model", *arguments)
    )


def test_tokenizer_with_missing_files_is_an_error(tmp_path: Path) -> None:
    EsmConfig(vocab_size=33).save_pretrained(tmp_path)
    with pytest.raises(EvaValueError, match="has no tokenizer that can be loaded"):
        load_tokenizer(str(tmp_path))


def test_error_without_text_is_named_by_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **named: Any) -> Any:
        raise OSError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(EvaValueError, match=r"no tokenizer that can be loaded \(OSError\)"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_with_added_tokens_only_is_accepted(tmp_path: Path) -> None:
    empty = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    empty.add_tokens(list("ACGT"))
    saved = PreTrainedTokenizerFast(tokenizer_object=empty, unk_token="<unk>", eos_token="</s>")
    saved.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("ACGT")["input_ids"] == [2, 3, 4, 5]


def test_tokenizer_without_get_added_vocab_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Mistral's own tokenizer, which has fewer methods than others."""
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0}, all_special_tokens=[])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    assert load_tokenizer("model") is tokenizer


@pytest.mark.parametrize("excluded", [["key"], r".*\.key", r"(?i).*\.KEY"])
def test_exclusions_of_the_config_are_kept_beside_the_heads(
    home: Path, tmp_path: Path, excluded: str | list[str]
) -> None:
    given = {"task_type": "TOKEN_CLS", "exclude_modules": excluded}
    (tmp_path / "c.json").write_text(json.dumps(given))
    result = init(home, tmp_path / "out", "--config", tmp_path / "c.json", model="bert")
    assert result.exit_code == 0, result.stderr
    names = EvaResult.load(tmp_path / "out" / "eva.safetensors").ranks
    assert len(names) == 10
    assert not any("classifier" in name or "key" in name for name in names)


@pytest.mark.parametrize(
    ("task", "head"), [("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")]
)
def test_initialize_excludes_task_heads_from_all_linear(task: str, head: str) -> None:
    """PEFT trains them in full, and would also adapt them for "all-linear"."""
    bert_config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    make = {"TOKEN_CLS": BertForTokenClassification, "QUESTION_ANS": BertForQuestionAnswering}
    options: dict[str, Any] = {"max_steps": 2, "on_not_converged": "ignore", "progress": False}
    config = lora(task_type=task, target_modules="All-Linear")
    model = initialize(make[task](bert_config), text_batches(2), config, **options)
    assert config.exclude_modules is None
    assert len(model.eva_result.ranks) == 6
    assert head not in model.eva_result.ranks
    assert isinstance(getattr(model.base_model.model, head), ModulesToSaveWrapper)


def test_config_with_target_parameters_does_not_get_all_linear() -> None:
    fields = {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": None}
    config = lora_config({**fields, "eva_config": {}}, Task.CAUSAL_LM)
    assert not config.target_modules


@pytest.mark.parametrize("kind", ["SEQ_CLASS", "seq_cls"])
def test_unknown_task_type_is_an_error(home: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"task_type": kind}))
    message = reason(init(home, tmp_path / "out", "--config", tmp_path / "c.json"))
    assert (
        f"task_type='{kind}' is unknown; pass --task, or use one of CAUSAL_LM, SEQ_2_SEQ" in message
    )


def test_config_with_a_byte_order_mark_is_read(home: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"r": 3}), encoding="utf-8-sig")
    out = tmp_path / "out"
    assert init(home, out, "--config", tmp_path / "c.json").exit_code == 0
    assert PeftConfig.from_pretrained(out).r == 4  # the option overrides the file


@pytest.mark.filterwarnings("always")
def test_missing_target_module_is_named(home: Path, tmp_path: Path) -> None:
    result = init(home, tmp_path / "out", "--target-modules", "q_proj,vproj,self_attn.k_proj")
    assert result.exit_code == 0
    assert "warning: target_modules names vproj, but the model has no such module" in result.stderr
    lines = [line for line in result.stderr.splitlines() if "Materializing param" not in line]
    assert not any("k_proj" in line for line in lines)  # except in the bar of early transformers 5


def test_infinite_rho_is_an_error(home: Path, tmp_path: Path) -> None:
    assert "rho=inf must be finite" in reason(init(home, tmp_path / "out", "--rho", "inf"))


def test_empty_data_option_is_an_error(home: Path, tmp_path: Path) -> None:
    message = reason(run("init", home / "llama", "--data", "", "--out", tmp_path / "out"))
    assert message.startswith(
        "error: no data given; pass the path of a .jsonl, .parquet or .txt file"
    )


def test_options_of_the_texts_and_the_model_are_passed_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: dict[str, Any] = {}
    model: list[Any] = []

    def load_texts(name: str, **options: Any) -> list[str]:
        texts.update(options)
        return ["a text"]

    def load_model(*options: Any) -> None:
        model.extend(options)
        raise EvaValueError("enough is known")

    monkeypatch.setattr("eva_peft.command.data.load_texts", load_texts)
    monkeypatch.setattr("eva_peft.cli.load_model", load_model)
    given = ["--split", "test", "--text-column", "words", "--limit", 7, "--dtype", "bfloat16"]
    given += ["--device-map", "auto", "--seed", 5, "--task", "masked-lm"]
    assert "enough is known" in reason(init(home, tmp_path / "out", *given))
    assert texts.pop("tokenizer").vocab_size > 26
    assert texts == {"split": "test", "text_column": "words", "limit": 7}
    assert model[1:] == [Task.MASKED_LM, "bfloat16", None, "auto", 5]

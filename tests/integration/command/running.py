"""Run the command line within the test process, on small models saved to a folder."""

import inspect
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner, Result

from eva_peft import cli

QUICK = ["--r", "4", "--batch-size", "4", "--max-length", "32", "--tau", "0.5"]


def make_home(home: Path) -> Path:
    """Save small models, each with a tokenizer, and a data file to a folder, and return it."""
    letters = {chr(97 + i): i + 3 for i in range(26)}
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **letters}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    size = {"vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaConfig(hidden_size=64, intermediate_size=96, max_position_embeddings=64, **size)
    LlamaForCausalLM(llama).save_pretrained(home / "llama")
    t5 = T5Config(
        vocab_size=32,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(t5).save_pretrained(home / "t5")
    bert = BertConfig(hidden_size=32, intermediate_size=48, max_position_embeddings=64, **size)
    BertModel(bert).save_pretrained(home / "bert")
    for name in ("llama", "t5", "bert"):
        fast.save_pretrained(home / name)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(97, 123, (64, 40), generator=generator).tolist()
    rows = [json.dumps({"text": bytes(text).decode()}) for text in texts]
    (home / "data.jsonl").write_text("\n".join(rows))
    return home


def run(*arguments: object) -> Result:
    return runner().invoke(cli.app, [str(argument) for argument in arguments])


def runner() -> CliRunner:
    """Return a runner that separates stderr, which click 8.1 does only if asked."""
    apart = "mix_stderr" in inspect.signature(CliRunner).parameters
    return CliRunner(mix_stderr=False) if apart else CliRunner()


def data_and_out(home: Path, out: Path) -> tuple[object, ...]:
    return "--data", home / "data.jsonl", "--out", out


def init(home: Path, out: Path, *arguments: object, model: str = "llama") -> Result:
    return run("init", home / model, *data_and_out(home, out), *QUICK, *arguments)


def reason(result: Result) -> str:
    """Return the last line on stderr of a failed command, which has the whole reason."""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return result.stderr.rstrip("\n").splitlines()[-1]

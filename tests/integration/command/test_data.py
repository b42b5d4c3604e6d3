"""Calibration texts from files and datasets, and the batches made from them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from eva_peft.command.data import (
    DataNotFoundError,
    DecoderInputs,
    load_texts,
    make_loader,
    padding_token,
)
from eva_peft.errors import EvaError, EvaValueError
from extras import needs

CHAT = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", "<pad>", "<unk>", "a", "b", "c", "d", "e"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write_jsonl(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_text_file_has_one_text_per_line(tmp_path: Path) -> None:
    file = tmp_path / "a.TXT"
    file.write_bytes("\ufeffone ä\r\n\r\n  \ntwo\n".encode())
    assert load_texts(str(file)) == ["one ä", "two"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"content": "x", "text": "one"}, {"text": " "}, {"text": None}, {"text": "two"}], 2),
        ([{"id": 1, "content": "one"}, {"content": "two"}], 2),
        ([{"id": 1}, {"text": "one", "id": 2}, {"text": "two"}], 2),
        ([{}, {"text": "one"}, {"text": "two"}], 2),
        ([{"prompt": "p", "response": "q"}], ["p\nq"]),
        ([{"prompt": "p", "completion": "q"}], ["p\nq"]),
        ([{"messages": CHAT}, {"messages": []}], ["why\nbecause"]),
        ([{"prompt": CHAT[:1], "completion": CHAT[1:]}], ["why\nbecause"]),
    ],
)
def test_text_columns_are_found(tmp_path: Path, rows: list[object], expected: object) -> None:
    texts = load_texts(write_jsonl(tmp_path / "a.jsonl", *rows))
    assert texts == (["one", "two"] if expected == 2 else expected)


def test_text_column_can_be_given(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "x", "body": "y"})
    assert load_texts(file, text_column="body") == ["y"]


def test_limit_does_not_count_blank_texts(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("a", "", "b", "c")]
    assert load_texts(write_jsonl(tmp_path / "a.jsonl", *rows), limit=2) == ["a", "b"]


def test_parquet_in_a_folder_with_brackets(tmp_path: Path) -> None:
    needs("datasets")
    pa = needs("pyarrow")
    folder = tmp_path / "part[1]"
    folder.mkdir()
    needs("pyarrow.parquet").write_table(
        pa.table({"n": [1, 2], "text": ["one", "two"]}), folder / "a.parquet"
    )
    assert load_texts(str(folder / "a.parquet"), limit=1) == ["one"]


def test_chat_is_rendered_by_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
    tokenizer.chat_template = TEMPLATE
    # The tokenizer puts <s> in front itself, so the template's is taken off.
    assert load_texts(file, tokenizer=tokenizer) == ["<user>why<assistant>because"]
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(EvaValueError, match=r"chat template rejects a chat .*no system role"):
        load_texts(file, tokenizer=tokenizer)


def test_hub_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("datasets")
    calls = []

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, str]]:
        calls.append((args, kwargs))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_texts("org/name:en", split="test") == ["one", "two"]
    assert load_texts("org/name") == ["one", "two"]
    assert calls == [
        (("org/name", "en"), {"split": "test", "streaming": True}),
        (("org/name", None), {"split": "train", "streaming": True}),
    ]


def test_folder_of_files_is_loaded_as_a_dataset(tmp_path: Path) -> None:
    needs("datasets")
    write_jsonl(tmp_path / "train.jsonl", {"text": "one"})
    assert load_texts(str(tmp_path)) == ["one"]
    with pytest.raises(EvaValueError, match=r"cannot load the dataset .*: Bad split: dev"):
        load_texts(str(tmp_path), split="dev")


BAD_FILES = [
    ("a.txt", b"", "a.txt is empty: it has no rows"),
    ("a.jsonl", b"\n \n", "a.jsonl is empty"),
    ("a.txt", b"good\nb\xe4d\n", "a.txt, line 2: not UTF-8"),
    ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "a.jsonl, line 1: not UTF-8"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
    ("a.jsonl", b'["x"]', "line 1: expected a JSON object with named columns, got list"),
    ("a.jsonl", b'{"body": "x", "n": 1}', "the columns are 'body', 'n'; name one"),
    ("a.jsonl", b'{"text": " "}', "text is blank in every row"),
    ("a.jsonl", b'{"text": 3}', "column 'text' of .* holds int, not text or chats"),
    ("a.jsonl", b'{"messages": ["x"]}', "'messages' .* not a chat: every message needs 'role'"),
    ("a.csv", b"text\nx\n", r"a file must end in one of \.jsonl, \.parquet, \.txt"),
    ("a.parquet", b"text", "cannot read .*a.parquet as Parquet"),
    ("a.parquet", b"", "cannot read .*a.parquet as Parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_invalid_files_are_errors(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith(".parquet"):
        needs("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaValueError, match=message):
        load_texts(str(tmp_path / name))


def test_invalid_arguments_are_errors(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(EvaValueError, match="no column 'body'; the columns are 'text'"):
        load_texts(file, text_column="body")
    with pytest.raises(EvaValueError, match="has no split 'test'; leave --split out"):
        load_texts(file, split="test")


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"there is no file .*a\.jsonl") as caught:
        load_texts(str(tmp_path / "a.jsonl"))
    assert isinstance(caught.value, EvaError)
    assert isinstance(caught.value, FileNotFoundError)


def test_missing_dataset_is_an_error() -> None:
    needs("datasets")
    with pytest.raises(DataNotFoundError, match="'no/such' is neither a file nor a dataset"):
        load_texts("no/such")


def test_missing_datasets_package_affects_only_hub_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install eva-kernels\[data\]"):
        load_texts("org/name")
    (tmp_path / "a.txt").write_text("one")
    assert load_texts(str(tmp_path / "a.txt")) == ["one"]


def test_batches_are_padded_to_the_longest(tokenizer: PreTrainedTokenizerFast) -> None:
    (batch,) = make_loader(["a", "a b c", "a b"], tokenizer, 3, 16, seed=0)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    rows = sorted(zip(batch["attention_mask"].tolist(), batch["input_ids"].tolist(), strict=True))
    assert rows == [
        ([1, 1, 0, 0], [0, 4, 2, 2]),
        ([1, 1, 1, 0], [0, 4, 5, 2]),
        ([1, 1, 1, 1], [0, 4, 5, 6]),
    ]


@pytest.mark.parametrize(("special", "pad"), [({"eos_token": "</s>"}, 1), ({}, 0)])
def test_pad_token_falls_back_to_eos_or_zero(special: dict[str, str], pad: int) -> None:
    tokenizer = make_tokenizer(**special)
    (batch,) = make_loader(["a", "a b"], tokenizer, 2, 16, seed=0)
    assert batch["input_ids"][~batch["attention_mask"].bool()].tolist() == [pad]
    assert tokenizer.pad_token is None


def test_long_texts_are_truncated(tokenizer: PreTrainedTokenizerFast) -> None:
    (batch,) = make_loader(["a b c d e"], tokenizer, 2, 3, seed=0)
    assert batch["input_ids"].tolist() == [[0, 4, 5]]
    tokenizer.model_max_length = 2
    (batch,) = make_loader(["a b c d e"], tokenizer, 2, 3, seed=0)
    assert batch["input_ids"].tolist() == [[0, 4]]


def test_model_limits_length_and_pad_token(tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(
        vocab_size=2, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert padding_token(tokenizer) == 2
    assert padding_token(tokenizer, model) == 1  # the end token, as 2 has no embedding
    batches = make_loader(["a b c d e", "a"], tokenizer, 2, 16, seed=0, model=model)
    assert sorted(next(iter(batches))["input_ids"].tolist()) == [[0, 4, 1], [0, 4, 5]]


def test_length_is_limited_by_the_positions_of_the_model(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "max_position_embeddings": 8}
    # RoBERTa's positions begin after that of padding
    roberta = RobertaModel(RobertaConfig(vocab_size=9, pad_token_id=1, **sizes))
    (batch,) = make_loader(["a " * 20], tokenizer, 1, 16, seed=0, model=roberta)
    assert batch["input_ids"].shape == (1, 6)
    roberta(**batch)
    roberta.config.max_position_embeddings = -1  # as XLNet's
    (batch,) = make_loader(["a " * 20], tokenizer, 1, 16, seed=0, model=roberta)
    assert batch["input_ids"].shape == (1, 16)


def test_unpaired_surrogate_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text('{"text": "one \\ud83d"}\n{"text": "two \\ud83d\\ude00"}\n')
    assert load_texts(str(path)) == ["one ?", "two \U0001f600"]


def test_message_with_tool_calls_needs_no_content(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    calls = [{"role": "user", "content": "one"}, {"role": "assistant", "tool_calls": [{}]}]
    path.write_text(json.dumps({"messages": calls}))
    assert load_texts(str(path)) == ["one\n"]
    path.write_text(json.dumps({"messages": [{"role": "assistant"}]}))
    with pytest.raises(EvaValueError, match="every message needs 'role' and 'content'"):
        load_texts(str(path))


def test_text_parts_of_a_message_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    parts = [{"type": "image"}, {"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "three"}]
    path.write_text(json.dumps({"messages": messages}))
    assert load_texts(str(path)) == ["one\ntwo\nthree"]


def test_empty_parquet_file_is_an_error(tmp_path: Path) -> None:
    needs("datasets")
    table = needs("pyarrow").table({"text": []})
    needs("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    with pytest.raises(EvaValueError, match="is empty: it has no rows"):
        load_texts(str(tmp_path / "a.parquet"))


def test_order_depends_on_the_seed_only(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["a", "b", "c", "d", "e"]

    def order(seed: int) -> list[int]:
        return [int(b["input_ids"][0, 1]) for b in make_loader(texts, tokenizer, 1, 4, seed)]

    state = torch.get_rng_state()
    first = order(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert order(1) == first
    assert sorted(first) == [4, 5, 6, 7, 8]
    assert len({tuple(order(seed)) for seed in range(6)}) > 1


def test_decoder_inputs_are_shifted() -> None:
    class Model:
        device = torch.device("meta")  # device of offloaded weights

        def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
            return labels.roll(1, 1)

    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    loader = DecoderInputs([batch], Model())
    for _ in range(2):
        (given,) = loader
        assert given["decoder_input_ids"].tolist() == [[3, 1, 2]]
        assert given["decoder_attention_mask"].tolist() == [[1, 1, 0]]

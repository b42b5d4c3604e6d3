"""The ``quality`` domain whose base is pre-trained on the spot, at its CPU size."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.quality import pretrained, training
from bench.quality import run as quality
from bench.quality.descent import DivergedError
from bench.quality.domain import Domain
from eva_peft.assets import load_tiny_llama, token_stream
from extras import needs_of


@pytest.fixture(scope="module")
def pretrained_domain() -> Iterator[Domain]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield pretrained.build_on(torch.device("cpu"))
    torch.set_num_threads(threads)


def test_package_files_are_read_in_an_order_given_by_the_seed() -> None:
    first, again = (
        pretrained.read_package_files(("torch",), "include/**/*.h", 50_000, 0) for _ in range(2)
    )
    assert first == again != pretrained.read_package_files(("torch",), "include/**/*.h", 50_000, 1)
    assert 50_000 <= sum(map(len, first)) < 250_000
    assert "#include" in "".join(first)
    assert pretrained.read_package_files(("no_such_package",), "*.py", 1, 0) == []


def test_batch_tokenization_equals_one_by_one() -> None:
    _, tokenizer = load_tiny_llama()
    texts = [f"x = {i}\n" * (i % 7) for i in range(150)]
    assert pretrained.tokens_of(tokenizer, texts) == token_stream(tokenizer, texts)


def test_held_out_samples_are_spread_and_not_in_training() -> None:
    ids = torch.arange(1000)[:, None]
    train, tested = pretrained.split_rows({"input_ids": ids, "labels": ids.clone()}, 32)
    for key in ("input_ids", "labels"):
        assert torch.equal(torch.cat([train[key], tested[key]]).sort(0).values, ids)
        assert len(tested[key]) == 32
        assert tested[key].diff(dim=0).max() <= 33
    few = {"input_ids": ids[:50]}
    assert [len(part["input_ids"]) for part in pretrained.split_rows(few, 32)] == [47, 3]


def test_whole_files_are_held_out_at_gpu_size() -> None:
    assert pretrained.SCALES["cuda"].by_file


@pytest.mark.parametrize("method", ["lora", "eva", "lora-ga", "corda-ipm"])
def test_methods_fine_tune_the_domain(pretrained_domain: Domain, method: str) -> None:
    needs_of(method)
    recipe = dataclasses.replace(pretrained_domain.recipe, steps=2, every=1, calibration=2)
    row = training.fine_tune(
        dataclasses.replace(pretrained_domain, recipe=recipe),
        method,
        1e-3,
        0,
        pretrained_domain.test,
    )
    assert [step for step, _ in row["curve"]] == [0, 1, 2]


def test_base_has_learnt_its_old_task(pretrained_domain: Domain) -> None:
    # `pretrained_domain` raises unless the base has learnt Python
    assert pretrained_domain.old.loss(pretrained_domain.base) < pretrained_domain.test.loss(
        pretrained_domain.base
    )  # C++ is not learnt as well
    assert not pretrained_domain.base.training


def test_base_that_has_not_learnt_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(pretrained.SCALES["cpu"], steps=3)
    monkeypatch.setitem(pretrained.SCALES, "cpu", short)
    with pytest.raises(
        DivergedError, match=r"not learnt: its loss is 7\..*uniform guess's is 7\.62"
    ):
        pretrained.build_on(torch.device("cpu"))


def test_rows_of_another_base_are_discarded(
    pretrained_domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rates = copy.deepcopy(pretrained_domain.base), []

    def fine_tune(at: Domain, method: str, rate: float, *args: Any, **more: Any) -> dict[str, Any]:
        rates.append(rate)
        if len(rates) == 2:
            raise KeyboardInterrupt
        return {"loss": rate, "score": 0.0}

    def run() -> None:
        few = quality.Preset(slice(0, 2), (100,), (0,))
        quality.run_preset("few", few, tmp_path, ["pretrained"], ["lora"], quiet=True, workers=2)

    monkeypatch.setattr(training, "fine_tune", fine_tune)
    monkeypatch.setattr(
        quality, "domain", lambda *args: dataclasses.replace(pretrained_domain, base=base)
    )
    with pytest.raises(KeyboardInterrupt):
        run()
    run()  # resumes after the first row
    assert len(rates) == 2 + 2
    (tmp_path / ".unfinished").mkdir(exist_ok=True)
    rates.clear()
    with pytest.raises(KeyboardInterrupt):
        run()
    with torch.no_grad():
        next(base.parameters()).view(-1)[0] += 1.0
    run()
    assert len(rates) == 2 + 3  # both rates again, and the test run
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    digests = {row["base_sha256"] for part in rows.values() for row in part}
    assert len(digests) == 1

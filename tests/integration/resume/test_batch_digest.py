"""A resumed pass warns if its loader yields other batches than that of the first run."""

from __future__ import annotations

import subprocess
import sys
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from eva_kernels import EvaWarning
from eva_peft.resume.batch_digest import MAX_ELEMENTS, _parts, digest_of_batch
from integration.conftest import lora, make_mlp, run, vectors
from integration.resume.resumed_passes import (
    CASES,
    EPOCH,
    Case,
    Noisy,
    check_equal,
    run_until_stopped,
)

OTHER_BATCH = "batch 3 differs.*may count some samples twice"


@dataclass
class Sample:
    x: Tensor
    name: str = "a"


@dataclass
class WithState(Sample):
    """A batch that notes something about itself only later."""

    state: Any = field(init=False)


def contained_in_itself() -> list[Any]:
    batch: list[Any] = [torch.ones(2)]
    batch.append(batch)
    return batch


BATCHES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.arange(12.0).reshape(3, 4),
    "bfloat16": lambda: torch.arange(12.0).reshape(3, 4).bfloat16(),
    "array": lambda: np.arange(12.0).reshape(3, 4),
    "mapping": lambda: {"input_ids": torch.arange(12), "text": ["one", "two"]},
    "user mapping": lambda: UserDict({"input_ids": torch.arange(12)}),
    "nested": lambda: [(torch.arange(3), {"y": [1, None, True, 2.5]}), b"raw"],
    "dataclass": lambda: Sample(torch.arange(3)),
    "objects": lambda: np.array([{"a": 1}, "b" * 99], dtype=object),
    "large": lambda: torch.arange(5 * MAX_ELEMENTS),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_digest_is_of_contents_and_not_of_the_object(kind: str) -> None:
    digests = {digest_of_batch(BATCHES[kind]()) for _ in range(3)}
    assert len(digests) == 1
    others = {digest_of_batch(make()) for name, make in BATCHES.items() if name != kind}
    assert not digests & others


def test_digest_is_the_same_in_another_process() -> None:
    code = (
        "from eva_peft.resume.batch_digest import digest_of_batch; import torch;"
        "print(digest_of_batch({'input_ids': torch.arange(12), 'text': ['one', 'two']}))"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert completed.stdout.strip() == digest_of_batch(BATCHES["mapping"]())


@pytest.mark.parametrize(
    "changed",
    [
        {"input_ids": torch.arange(1, 13), "text": ["one", "two"]},
        {"input_ids": torch.arange(12).reshape(3, 4), "text": ["one", "two"]},
        {"input_ids": torch.arange(12).int(), "text": ["one", "two"]},
        {"input_ids": torch.arange(12), "text": ["one", "too"]},
        {"input_ids": torch.arange(12), "text": ["on", "etwo"]},
        {"ids": torch.arange(12), "text": ["one", "two"]},
        {"input_ids": torch.arange(12), "text": ["one"]},
        [torch.arange(12), ["one", "two"]],
    ],
)
def test_digest_changes_with_values_shapes_dtypes_and_names(changed: Any) -> None:
    assert digest_of_batch(changed) != digest_of_batch(BATCHES["mapping"]())


def test_digest_does_not_depend_on_the_order_of_names() -> None:
    batch = {"input_ids": torch.arange(12), "labels": torch.arange(12), 0: "one"}
    assert digest_of_batch(dict(reversed(batch.items()))) == digest_of_batch(batch)
    swapped = {**batch, "labels": batch["input_ids"] + 1}
    assert digest_of_batch(swapped) != digest_of_batch(batch)


def test_digest_of_lists_takes_no_step_for_each_number() -> None:
    pixels = torch.rand(4, 3, 32, 32).tolist()
    assert len(list(_parts(pixels))) < 4 * 3 * 32 * 32 / 4
    other = torch.tensor(pixels).tolist()
    assert digest_of_batch(other) == digest_of_batch(pixels)
    other[3][2][31][31] += 1.0
    assert digest_of_batch(other) != digest_of_batch(pixels)
    assert digest_of_batch([1, 2**70]) == digest_of_batch([1, 2**70 + 0])
    assert digest_of_batch([1, 2**70]) != digest_of_batch([1, 2**71])


def test_digest_of_a_dataclass_reads_what_its_constructor_takes() -> None:
    batch = WithState(torch.arange(3))
    assert digest_of_batch(batch) == digest_of_batch(WithState(torch.arange(3)))
    assert digest_of_batch(batch) != digest_of_batch(WithState(torch.arange(4)))


def test_digest_reads_elements_regardless_of_memory_layout() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert digest_of_batch(x.t().contiguous().t()) == digest_of_batch(x)
    assert digest_of_batch(x.clone().requires_grad_()) == digest_of_batch(x)


@pytest.mark.parametrize(
    "unreadable",
    [
        torch.empty(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        object(),
        {1, 2},
        Sample,
    ],
    ids=["meta", "sparse", "nested", "object", "set", "class"],
)
def test_digest_of_what_cannot_be_read(unreadable: Any) -> None:
    assert digest_of_batch([unreadable, 1]) == digest_of_batch([unreadable, 1])
    assert digest_of_batch([unreadable, 1]) != digest_of_batch([unreadable, 2])


@pytest.mark.parametrize("make", [contained_in_itself, lambda: [10**5000]], ids=["cycle", "long"])
def test_digest_of_a_container_that_cannot_be_read(make: Callable[[], Any]) -> None:
    def digest_at_depth(depth: int) -> str:
        return digest_at_depth(depth - 1) if depth else digest_of_batch(make())

    assert digest_at_depth(0) == digest_at_depth(50)


def test_other_batches_are_warned_about(tmp_path: Path) -> None:
    path, case = tmp_path / "state.safetensors", CASES["gram"]
    run_until_stopped(case, path, 3)
    data = case.batches()
    data[2], data[3] = data[3], data[2]
    with pytest.warns(EvaWarning, match=OTHER_BATCH) as caught:
        result = case.result(data, checkpoint=path, max_steps=4)
    assert result.forwards == 4
    assert str(path) in str(caught[0].message)
    assert Path(caught[0].filename).name == "conftest.py"  # where the pass is called


def test_equal_batches_of_another_loader_are_not_warned_about(tmp_path: Path) -> None:
    path, case = tmp_path / "state.safetensors", CASES["gram"]
    run_until_stopped(case, path, 3)
    check_equal(case.result(tuple(case.batches()), checkpoint=path), case.result())


def test_loader_with_a_generator_of_its_own_must_be_seeded_again(tmp_path: Path) -> None:
    path, data = tmp_path / "state.safetensors", torch.cat(vectors(EPOCH))

    def resumed(seed: int, max_steps: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(data, 40, shuffle=True, generator=generator)  # type: ignore[arg-type]
        run(make_mlp(), loader, lora(tau=1.0), checkpoint=path, max_steps=max_steps)

    resumed(0, 3)
    resumed(0, 3 + 1)
    with pytest.warns(EvaWarning, match="batch 4 differs.*must be seeded again"):
        resumed(1, 5)


def test_random_batches_may_differ_if_the_model_draws_random_numbers_too(tmp_path: Path) -> None:
    class Augmenting:
        def __iter__(self) -> Iterator[Tensor]:
            for x in vectors(EPOCH):
                yield x + torch.randn_like(x)

    case = Case(Noisy, lambda: Augmenting())  # type: ignore[arg-type,return-value]
    path = tmp_path / "state.safetensors"
    results = []
    for options in ({"max_steps": 4}, {"max_steps": 3, "checkpoint": path}):
        torch.manual_seed(0)
        results.append(case.result(**options))
    check_equal(case.result(checkpoint=path, max_steps=4), results[0])


def test_batches_are_not_read_without_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eva_peft.resume.checkpoint.digest_of_batch", None)
    assert CASES["gram"].result(max_steps=2).forwards == 2

"""The domain of ``quality`` that is pre-trained where it runs, at its size for a CPU."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from bench.quality import pretrained, training
from bench.quality.domain import Domain


@pytest.fixture(scope="module")
def found() -> Iterator[Domain]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield pretrained.build_on(torch.device("cpu"))
    torch.set_num_threads(threads)


def test_sources_of_packages_are_read_in_an_order_of_the_seed() -> None:
    first, again = (pretrained.read(("torch",), "include/**/*.h", 50_000, 0) for _ in range(2))
    assert first == again != pretrained.read(("torch",), "include/**/*.h", 50_000, 1)
    assert 50_000 <= sum(map(len, first)) < 250_000
    assert "#include" in "".join(first)
    assert pretrained.read(("no_such_package",), "*.py", 1, 0) == []


@pytest.mark.parametrize("method", ["lora", "eva", "lora-ga", "corda-ipm"])
def test_methods_adapt_it(found: Domain, method: str) -> None:
    recipe = dataclasses.replace(found.recipe, steps=2, every=1, calibration=2)
    row = training.fine_tune(dataclasses.replace(found, recipe=recipe), method, 1e-3, 0, found.test)
    assert [step for step, _ in row["curve"]] == [0, 1, 2]


def test_a_base_is_trained_here(found: Domain) -> None:
    vocabulary = found.base.config.vocab_size
    assert found.old.loss(found.base) < 0.85 * math.log(vocabulary)  # Python is learnt
    assert found.old.loss(found.base) < found.test.loss(found.base)  # C++ less so
    assert not found.base.training

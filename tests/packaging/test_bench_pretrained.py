"""The domain of ``quality`` that is pre-trained where it runs, at its size for a CPU."""

import math

from bench.quality import pretrained
from bench.quality.domains import domain


def test_sources_of_packages_are_read_in_an_order_of_the_seed() -> None:
    first, again = (pretrained.read(("torch",), "include/**/*.h", 50_000, 0) for _ in range(2))
    assert first == again != pretrained.read(("torch",), "include/**/*.h", 50_000, 1)
    assert 50_000 <= sum(map(len, first)) < 250_000
    assert "#include" in "".join(first)
    assert pretrained.read(("no_such_package",), "*.py", 1, 0) == []


def test_a_base_is_trained_here() -> None:
    found = domain("pretrained")
    vocabulary = found.base.config.vocab_size
    assert found.old.loss(found.base) < 0.85 * math.log(vocabulary)  # Python is learnt
    assert found.old.loss(found.base) < found.test.loss(found.base)  # C++ less so
    assert not found.base.training

"""The choice of method per layer input, by the bytes that a stream takes."""

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eva_kernels.errors import EvaValueError
from eva_kernels.streaming import InputStream, StreamPlan, fold_bytes, plan_streams, stream_bytes
from eva_kernels.streaming.plan import sketch_width
from eva_kernels.streaming.state import GramState
from helpers import feed, make_stream

examples = settings(max_examples=25, deadline=None, derandomize=True, database=None)
sizes = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 64)), min_size=1, max_size=6)


def total(plans: list[StreamPlan]) -> int:
    return sum(stream_bytes(plan) for plan in plans)


def held(stream: InputStream) -> int:
    """Return the bytes of all distinct tensors and arrays that a stream holds between steps."""
    sketch, sums = stream.sketch, stream.sums
    parts = [*vars(sketch).values(), *vars(sums).values()]
    if isinstance(stream.state, GramState):
        parts.append(stream.state.pivot)
    return sum(getattr(part, "nbytes", 0) for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_planned_bytes_equal_the_bytes_of_the_tensors(method: str, dtype: torch.dtype):
    stream = feed(make_stream(40, 6, method=method, dtype=dtype), [torch.randn(50, 40)])
    plan = StreamPlan(40, 6, 12, method)
    assert stream_bytes(plan, dtype.itemsize) == held(stream)
    # the rows to compare keep the previous basis alive
    feed(stream, [torch.randn(50, 40)])
    assert (
        fold_bytes(plan, dtype.itemsize, on_cpu=True) == stream.previous.untyped_storage().nbytes()
    )


@pytest.mark.parametrize(
    ("features", "components", "oversample", "width"),
    [(100, 8, 2.0, 16), (100, 8, 1.0, 8), (100, 7, 1.5, 11), (10, 8, 2.0, 10), (1, 1, 2.0, 1)],
)
def test_sketch_width(features: int, components: int, oversample: float, width: int):
    assert sketch_width(features, components, oversample) == width


def test_components_are_limited_to_the_features():
    plan = plan_streams([4], [16], method="sketch")[0]
    assert (plan.components, plan.width) == (4, 4)


@examples
@given(shapes=sizes)
@example(shapes=[(64, 16), (65, 16)])  # equal arithmetic, and one feature more
def test_auto_without_a_budget_is_gram_if_it_needs_no_more_flops(shapes: list[tuple[int, int]]):
    features, components = zip(*shapes, strict=True)
    plans = plan_streams(features, components)
    sketches = plan_streams(features, components, method="sketch")
    grams = plan_streams(features, components, method="gram")
    for plan, sketch, gram in zip(plans, sketches, grams, strict=True):
        # flops per token: 2 D^2 for gram, 4 D Q for the sketch
        exact = 2 * plan.features**2 <= 4 * plan.features * plan.width
        assert plan == (gram if exact else sketch)


@examples
@given(shapes=sizes, share=st.floats(0, 1.2))
def test_auto_uses_gram_for_the_narrowest_inputs_that_fit(
    shapes: list[tuple[int, int]], share: float
):
    features, components = zip(*shapes, strict=True)
    least = total(plan_streams(features, components))
    most = total(plan_streams(features, components, method="gram"))
    budget = least + int(share * abs(most - least))
    plans = plan_streams(features, components, memory_budget=budget)
    assert total(plans) <= budget
    for plan in plans:
        if plan.method == "sketch":
            gram = StreamPlan(plan.features, plan.components, plan.width, "gram")
            # It does not fit in addition to the chosen ones.
            assert total(plans) - stream_bytes(plan) + stream_bytes(gram) > budget


def test_narrow_inputs_get_gram_first():
    features, components = [512, 64, 256, 64], [8] * 4
    sketches = plan_streams(features, components, method="sketch")
    grams = plan_streams(features, components, method="gram")
    extra = [stream_bytes(g) - stream_bytes(s) for g, s in zip(grams, sketches, strict=True)]
    budget = total(sketches)
    expected = ["sketch"] * 4
    for i in (1, 3, 2, 0):
        just_below = plan_streams(features, components, memory_budget=budget + extra[i] - 1)
        assert [p.method for p in just_below] == expected
        budget += extra[i]
        expected[i] = "gram"
        plans = plan_streams(features, components, memory_budget=budget)
        assert [p.method for p in plans] == expected


@pytest.mark.parametrize("method", ["auto", "sketch", "gram"])
def test_error_of_a_too_small_budget_names_the_minimum(method: str):
    arguments = {"features": [256, 64], "components": [8, 8], "method": method}
    with pytest.raises(EvaValueError, match="needs at least") as caught:
        plan_streams(**arguments, memory_budget=1000)
    least = int(re.search(r"at least (\d+) bytes for 2 layer inputs", str(caught.value)).group(1))
    assert len(plan_streams(**arguments, memory_budget=least)) == 2
    with pytest.raises(EvaValueError, match=f"at least {least} bytes"):
        plan_streams(**arguments, memory_budget=least - 1)


def test_invalid_options():
    with pytest.raises(EvaValueError, match="method='exact' is unknown; choose one of"):
        plan_streams([8], [2], method="exact")
    with pytest.raises(EvaValueError, match=r"oversample=0\.5 must be at least 1"):
        plan_streams([8], [2], oversample=0.5)

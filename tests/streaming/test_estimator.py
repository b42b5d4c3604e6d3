"""``IncrementalPCA`` with scikit-learn's tools, overflow, invalid arguments and unusual inputs."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import sklearn.base
import torch
from sklearn.decomposition import PCA
from sklearn.model_selection import ParameterGrid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import gen_batches, get_tags
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from eva_kernels import IncrementalPCA, NonFiniteError
from eva_kernels.errors import EvaTypeError, EvaValueError
from helpers import decaying, exact, relative, with_spectrum

METHODS = ["sketch", "gram"]


def data(tokens: int = 400, features: int = 40, **options: Any) -> Tensor:
    return with_spectrum(tokens, features, decaying(features, 2.0), offset=20.0, **options)


def test_clone_and_parameter_grid():
    first = IncrementalPCA(4, method="gram", oversample=3.0).fit(data())
    again = sklearn.base.clone(first)
    assert again.get_params() == first.get_params()
    assert again._stream is None
    sizes = [
        IncrementalPCA().set_params(**given).fit(data()).n_components_
        for given in ParameterGrid({"n_components": [2, 5], "seed": [1]})
    ]
    assert sizes == [2, 5]
    assert repr(first).startswith("IncrementalPCA(n_components=4, method='gram', oversample=3.0,")


def test_pipeline_equals_scikit_learn():
    x = data(dtype=torch.float64).numpy()
    pipeline = make_pipeline(StandardScaler(), IncrementalPCA(4, method="gram"))
    found = pipeline.fit(x).transform(x)
    expected = make_pipeline(StandardScaler(), PCA(4, svd_solver="full")).fit_transform(x)
    assert relative(found.abs(), torch.as_tensor(np.abs(expected))) <= 1e-6
    check_is_fitted(pipeline[-1])
    with pytest.raises(sklearn.exceptions.NotFittedError):
        check_is_fitted(IncrementalPCA(3))


def test_feature_names_out_are_those_of_scikit_learn():
    x = data(dtype=torch.float64).numpy()
    pipeline = make_pipeline(StandardScaler(), IncrementalPCA(2)).fit(x)
    theirs = make_pipeline(sklearn.decomposition.IncrementalPCA(2)).fit(x)
    names = pipeline.get_feature_names_out(), theirs.get_feature_names_out()
    np.testing.assert_array_equal(*names, strict=True)


def test_tags_are_those_of_scikit_learn_except_sparse():
    ours, theirs = map(get_tags, (IncrementalPCA(2), sklearn.decomposition.IncrementalPCA(2)))
    assert theirs.input_tags.sparse
    theirs.input_tags.sparse = False
    assert ours == theirs


@pytest.mark.parametrize("method", METHODS)
def test_shallow_copy_is_independent(method: str):
    x = data()
    pca = IncrementalPCA(4, method=method).partial_fit(x[:200])
    variance, spread = pca.explained_variance_.clone(), pca.var_.clone()
    copied = copy.copy(pca).partial_fit(3 * x[200:])
    assert (pca.n_samples_seen_, copied.n_samples_seen_) == (200, 400)
    assert torch.equal(pca.explained_variance_, variance)
    assert torch.equal(pca.var_, spread)

    class Subclass(IncrementalPCA):
        pass

    empty = copy.copy(Subclass(4))
    assert (type(empty), empty.n_samples_seen_) == (Subclass, 0)


@pytest.mark.parametrize("method", METHODS)
def test_batch_that_overflows_the_dtype_of_the_first_raises(method: str):
    x = data(dtype=torch.float64)
    pca = IncrementalPCA(4, method=method).partial_fit(x.float())
    before = pca.components_.clone()
    # The message ends here and does not mention rows.
    message = r"overflow torch.float32; scale the data, or give it as float64$"
    with pytest.raises(NonFiniteError, match=message):
        pca.partial_fit(x * 1e30)
    broken = torch.cat([x[:1] / 0, x * 1e30])  # the masked row must not be blamed
    with pytest.raises(NonFiniteError, match=message):
        pca.partial_fit(broken, mask=torch.arange(401) > 0)
    with pytest.raises(EvaValueError, match=r"overflow torch.float32; scale the data"):
        pca.merge(IncrementalPCA(4, method=method).partial_fit(x * 1e30))
    assert pca.n_samples_seen_ == 400
    assert torch.equal(pca.components_, before)
    assert pca.partial_fit(x).n_samples_seen_ == 800


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("folded", [False, True])
def test_sketch_overflow_refuses_only_that_batch(folded: bool, dtype: torch.dtype):
    most = 1e154 if dtype == torch.float64 else 3e38  # sum of squares
    x = torch.randn(8, 32, dtype=dtype)
    x[:, 0] = torch.tensor([1.0, -1.0], dtype=dtype).repeat(4) * (most / 10) ** 0.5
    pca = IncrementalPCA(4 if folded else 8, method="sketch").partial_fit(x)
    assert pca._stream.pending == (0 if folded else 8)
    if folded and dtype == torch.float32:  # folded sums are float64
        pca.partial_fit(x)
    else:
        with pytest.raises(NonFiniteError, match=r"squares overflow .* scale the data"):
            pca.partial_fit(x)
        assert pca.n_samples_seen_ == 8
    assert pca.components_.isfinite().all()
    assert pca.partial_fit(x / 1e9).components_.isfinite().all()


def test_gram_overflow_refuses_only_that_batch():
    x = 1e17 * torch.randn(400, 40)
    pca = IncrementalPCA(4, method="gram").partial_fit(x).partial_fit(x)
    with pytest.raises(NonFiniteError, match="overflow"):
        pca.partial_fit(x)
    assert pca.n_samples_seen_ == 800
    assert pca.components_.isfinite().all()
    assert pca.partial_fit(x[:1] / 1e16).n_samples_seen_ == 801


@pytest.mark.parametrize("method", METHODS)
def test_squares_about_a_distant_mean_overflow(method: str):
    pca = IncrementalPCA(1, method=method).partial_fit(torch.tensor([[1.8e19]]))
    with pytest.raises(NonFiniteError, match=r"overflow torch.float32; scale the data"):
        pca.partial_fit(torch.tensor([[-1.8e19]]))
    assert pca.n_samples_seen_ == 1
    assert pca.partial_fit(torch.tensor([[1.7e18]])).singular_values_ > 1e19
    many = torch.full((100, 1), 1.2e18)  # each can be squared, and so can their sum
    pca = IncrementalPCA(1, method=method).partial_fit(many)
    with pytest.raises(NonFiniteError, match=r"overflow torch.float32; scale the data"):
        pca.partial_fit(-many)


def test_invalid_set_params_changes_nothing():
    pca = IncrementalPCA(4)
    with pytest.raises(EvaValueError, match=r"invalid parameter 'k' .* valid parameters are \['n_"):
        pca.set_params(k=3)
    with pytest.raises(EvaValueError, match="method='x' is unknown"):
        pca.set_params(n_components=5, method="x")
    assert (pca.n_components, pca.method) == (4, "auto")


@pytest.mark.parametrize(("method", "tolerance"), [("gram", 1e-6), ("sketch", 1e-4)])
def test_inverse_transform_and_covariance(method: str, tolerance: float):
    x = data(dtype=torch.float64)
    pca = IncrementalPCA(6, method=method).fit(x)
    theirs = PCA(6, svd_solver="full").fit(x.numpy())
    back = pca.inverse_transform(pca.transform(x))
    expected = theirs.inverse_transform(theirs.transform(x.numpy()))
    assert relative(back, torch.as_tensor(expected)) <= tolerance
    assert relative(pca.get_covariance(), torch.as_tensor(theirs.get_covariance())) <= 1e-4
    with pytest.raises(EvaValueError, match="X has 5 coordinates, not 6"):
        pca.inverse_transform(x[:, :5])


def test_covariance_of_all_components_is_exact():
    x = data(300, 8, dtype=torch.float64)
    found = IncrementalPCA(8).fit(x).get_covariance()
    torch.testing.assert_close(found, torch.cov(x.mT))


def test_covariance_includes_the_variance_beyond_the_components():
    x = with_spectrum(400, 40, decaying(40, 0.1), dtype=torch.float64)
    found = IncrementalPCA(6, method="gram").fit(x).get_covariance()
    expected = PCA(6, svd_solver="full").fit(x.numpy()).get_covariance()
    assert relative(found, torch.as_tensor(expected)) <= 1e-9


def test_one_row_has_no_variance():
    pca = IncrementalPCA(1).partial_fit(data()[:1])
    assert pca.explained_variance_.tolist() == [0.0]
    assert pca.noise_variance_ == 0.0


def test_eigenvalues_of_covariance_are_not_below_the_noise():
    pca = IncrementalPCA(10, method="sketch", oversample=1)
    for batch in torch.randn(296, 12).split(37):
        pca.partial_fit(batch)
    noise = pca.noise_variance_
    assert pca.explained_variance_[-1] < 0.9 * noise  # a narrow sketch misses some of it
    assert torch.linalg.eigvalsh(pca.get_covariance())[0] >= 0.999 * noise


def test_components_are_updated_by_each_batch():
    x = data()
    pca = IncrementalPCA(4).partial_fit(x[:200].clone().requires_grad_())
    before = pca.components_
    pca.partial_fit(x[200:])
    assert not torch.equal(pca.components_, before)
    assert torch.equal(pca.components_, IncrementalPCA(4).fit(x, batch_size=200).components_)
    assert not pca.components_.requires_grad


def test_fit_merges_a_short_last_batch():
    x = data()[:203]
    pca = IncrementalPCA(4, batch_size=50).fit(x, batch_size=100)
    assert pca.batch_size_ == 100
    expected = (
        IncrementalPCA(4).partial_fit(x[:100]).partial_fit(x[100:])
    )  # the last 3 rows are fewer than the components
    assert torch.equal(pca.components_, expected.components_)


def test_attribute_set_directly_is_checked_by_partial_fit():
    pca = IncrementalPCA(4)
    pca.n_components = 2.5
    with pytest.raises(EvaTypeError, match=r"n_components=2.5 must be a whole number"):
        pca.partial_fit(data())


def test_attributes_after_fit():
    pca = IncrementalPCA(6, batch_size=150).fit(data())
    assert (pca.n_components_, pca.n_features_in_, pca.batch_size_) == (6, 40, 150)
    assert IncrementalPCA(6).fit(data()).batch_size_ == 5 * 40


def test_refused_fit_keeps_the_previous_one():
    pca = IncrementalPCA(3).fit(data())
    expected = pca.components_
    for given in ({"batch_size": 0}, {"batch_size": -1}):
        with pytest.raises(
            EvaValueError, match=f"batch_size={given['batch_size']} must be at least"
        ):
            pca.fit(data(), **given)
    with pytest.raises(EvaValueError, match="expected a 2D array"):
        pca.fit(data()[0])
    pca.set_params(seed=5)  # for the next fit
    pca.oversample = 0.5
    with pytest.raises(EvaValueError, match=r"oversample=0\.5"):
        pca.fit(data())
    assert torch.equal(pca.components_, expected)


def test_last_batch_is_separate_if_it_has_as_many_rows_as_components():
    sizes = []

    class Recording(IncrementalPCA):
        def partial_fit(self, x: Any, *given: Any, **options: Any) -> IncrementalPCA:
            sizes.append(len(x))
            return super().partial_fit(x, *given, **options)

    for k, rows in ((3, 23), (3, 22), (None, 21)):
        sizes.clear()
        Recording(k).fit(data()[:rows], batch_size=10)
        batches = gen_batches(rows, 10, min_batch_size=k or 0)
        assert sizes == [batch.stop - batch.start for batch in batches]


def test_default_components_equal_the_unmasked_rows():
    pca = IncrementalPCA()
    pca.partial_fit(data()[:20], mask=torch.arange(20) < 7)
    assert (pca.n_components_, pca.n_samples_seen_) == (7, 7)
    pca.partial_fit(data()[:20], mask=torch.zeros(20, dtype=torch.bool))
    assert pca.n_samples_seen_ == 7
    torch.testing.assert_close(pca.var_, data()[:20][:7].var(0, correction=0))


def test_stream_gets_seed_backend_and_precision():
    options = IncrementalPCA().fit(data())._stream.options
    assert (options.seed, options.backend, options.precision) == (0, "auto", "high")
    for seed in (-(2**63), 2**63 - 1):
        pca = IncrementalPCA(3, seed=seed, backend="torch", precision="fast").fit(data())
        options = pca._stream.options
        assert (options.seed, options.backend, options.precision) == (seed, "torch", "fast")
    for seed in (-(2**63) - 1, 2**63):
        with pytest.raises(EvaValueError, match=r"seed=.* must be between"):
            IncrementalPCA(3, seed=seed)


def test_transforms_convert_to_the_dtype_of_the_components():
    pca = IncrementalPCA(3).fit(data())
    coordinates = pca.transform(data())
    for dtype in (torch.float64, torch.bfloat16):
        given = coordinates.to(dtype)
        found = pca.inverse_transform(given)
        assert found.dtype == torch.float32
        assert torch.equal(found, pca.inverse_transform(given.float()))
        x = data().to(dtype)
        assert torch.equal(pca.transform(x), pca.transform(x.float()))


def test_fit_transform_forgets_the_previous_fit():
    x = data()
    pca = IncrementalPCA(4, method="sketch", batch_size=50).fit(3 * x[:300])
    found = pca.fit_transform(x)
    assert pca.n_samples_seen_ == 400
    again = IncrementalPCA(4, method="sketch", batch_size=50).fit(x)
    assert torch.equal(found, again.transform(x))


def test_changing_a_returned_attribute_does_not_change_the_estimator():
    x = data(dtype=torch.float64)
    pca = IncrementalPCA(6).fit(x)
    for name in ("singular_values_", "explained_variance_ratio_"):
        before = getattr(pca, name).clone()
        getattr(pca, name).mul_(2)
        assert torch.equal(getattr(pca, name), before), name


def test_changed_n_components_needs_a_new_fit():
    pca = IncrementalPCA(4).partial_fit(data())
    for pca.n_components in (3, 6):
        with pytest.raises(EvaValueError, match=r"n_components was 4 .* and is [36] now; call fit"):
            pca.partial_fit(data())
    assert pca.fit(data()).n_components_ == 6


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"n_components": 2.0}, EvaTypeError, "n_components=2.0 must be a whole number"),
        ({"n_components": 0.95}, EvaTypeError, "n_components=0.95 must be a whole number"),
        ({"n_components": "mle"}, EvaTypeError, "n_components='mle' must be"),
        ({"n_components": True}, EvaTypeError, "n_components=True must be"),
        ({"n_components": 0}, EvaValueError, "n_components=0 must be at least 1"),
        ({"batch_size": 0}, EvaValueError, "batch_size=0 must be at least 1"),
        ({"oversample": 0.5}, EvaValueError, "oversample=0.5 must be at least 1"),
        ({"oversample": float("inf")}, EvaValueError, "oversample=inf must be .* finite"),
        ({"oversample": float("nan")}, EvaValueError, "oversample=nan must be"),
        ({"oversample": "2"}, EvaTypeError, "oversample='2' must be a number"),
        ({"seed": 2**70}, EvaValueError, "seed=.* must be between"),
        ({"seed": None}, EvaTypeError, "seed=None must be a whole number"),
    ],
)
def test_invalid_arguments(arguments: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        IncrementalPCA(**arguments)


def test_integers_of_numpy_and_torch():
    assert IncrementalPCA(np.int64(3), seed=np.int32(1)).fit(data()).n_components_ == 3
    assert IncrementalPCA(3, seed=-5).fit(data()).n_components_ == 3
    assert IncrementalPCA(torch.tensor(3)).fit(data()).n_components_ == 3


def test_invalid_shapes():
    pca = IncrementalPCA(4)
    with pytest.raises(EvaValueError, match=r"expected a 2D array .* reshape\(1, -1\) one row"):
        pca.fit(torch.randn(40))
    with pytest.raises(EvaValueError, match=r"expected a 2D array .* got shape \(1, 400, 40\)"):
        pca.fit(data()[None])
    for number in (torch.tensor(3.0), np.float32(3), 3.0):
        with pytest.raises(EvaValueError, match=r"expected rows of features, .* of shape \(\)"):
            IncrementalPCA().partial_fit(number)
    pca.fit(data()[:, :39])
    for features in (38, 40):
        with pytest.raises(EvaValueError, match=rf"X has {features} features, .* expecting 39"):
            pca.transform(data()[:, :features])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.eye(6).to_sparse(), "dense data are needed, got a tensor of layout torch.sparse"),
        (scipy.sparse.eye(6, format="csr"), r"dense data are needed, got csr.*; see its toarray"),
        (np.array([["a", "b"]]), "numbers are needed, got an array of dtype <U1"),
        (np.array([[None, 1]]), "numbers are needed, got an array of dtype object"),
    ],
)
def test_sparse_and_non_numeric_input_raises(values: Any, words: str):
    with pytest.raises(EvaTypeError, match=words):
        IncrementalPCA(2).partial_fit(values)


def test_object_array_of_numbers():
    # as those of a DataFrame after convert_dtypes
    x = data().double()
    found = IncrementalPCA(4).fit(x.numpy().astype(object))
    assert torch.equal(found.components_, IncrementalPCA(4).fit(x).components_)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(dtype: torch.dtype):
    x = data().to(dtype)
    found, expected = (IncrementalPCA(4).fit(each) for each in (x, x.float()))
    assert torch.equal(found.components_, expected.components_)
    assert torch.equal(found.transform(x), expected.transform(x.float()))


# torch calls its compressed layouts a beta
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_sparse_csr_raises():
    with pytest.raises(EvaTypeError, match=r"got a tensor of layout torch\.sparse_csr"):
        IncrementalPCA(2).partial_fit(torch.eye(6).to_sparse_csr())


def test_read_only_array():
    x = data().numpy()
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pca = IncrementalPCA(4).partial_fit(x)
    assert torch.equal(pca.mean_, IncrementalPCA(4).partial_fit(data()).mean_)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_in_some_calls(method: str, first: bool):
    x, pca = data(), IncrementalPCA(4, method=method)
    for i, batch in enumerate(x.split(100)):
        with torch.inference_mode(first == (i % 2 == 0)):
            pca.partial_fit(batch * 1.0)
            pca.components_  # noqa: B018  # ends the step
    expected = IncrementalPCA(4, method=method)
    for batch in x.split(100):
        expected.partial_fit(batch)
        expected.components_  # noqa: B018
    assert torch.equal(pca.components_, expected.components_)
    with torch.inference_mode():
        merged = IncrementalPCA(4, method=method).merge(pca)
    merged.partial_fit(x)
    assert merged.n_samples_seen_ == 800
    with torch.inference_mode():
        merged.components_  # noqa: B018
    merged.transform(x.requires_grad_()).sum().backward()
    rows = merged.components_.sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_merge_of_float32_and_float64(method: str, dtypes: tuple[torch.dtype, ...]):
    x = data(600)
    parts = x[:200], x[200:400]
    left, right = (
        IncrementalPCA(6, method=method).fit(part.to(dtype))
        for part, dtype in zip(parts, dtypes, strict=True)
    )
    left.merge(right).partial_fit(x[400:].to(dtypes[0]))
    assert {left.mean_.dtype, left.components_.dtype} == {dtypes[0]}
    assert relative(left.singular_values_[:4], exact(x)[0][:4]) <= 1e-3
    assert relative(left.mean_, x.double().mean(0)) <= 1e-6


def test_merge_with_other_n_components_raises():
    seven = IncrementalPCA(7).fit(data())
    for count in (3, 9):
        with pytest.raises(EvaValueError, match=rf"merge 7 components .* of n_components={count}"):
            IncrementalPCA(count).merge(seven)
    assert IncrementalPCA().merge(seven).n_components_ == 7


@pytest.mark.parametrize("method", METHODS)
def test_overflow_in_float64(method: str):
    x = data(dtype=torch.float64)
    with pytest.raises(
        NonFiniteError, match=r"products of their squares overflow .* scale the dat"
    ):
        IncrementalPCA(4, method=method).fit(x * 1e80)
    pca = IncrementalPCA(4, method=method).fit(x * 1e70)
    assert relative(pca.singular_values_ / 1e70, exact(x)[0][:4]) <= 1e-3

"""``IncrementalPCA`` against scikit-learn: names, shapes, values, errors."""

import pickle

import numpy as np
import pytest
import sklearn.decomposition
import sklearn.exceptions
import torch
from torch import Tensor

from eva_kernels import IncrementalPCA, NonFiniteError
from eva_kernels.errors import EvaTypeError, EvaValueError
from eva_kernels.streaming import _host
from helpers import decaying, exact, lost_variance, orthonormality, relative, with_spectrum

METHODS = ["sketch", "gram"]
ATTRIBUTES = [
    "components_",
    "singular_values_",
    "explained_variance_",
    "explained_variance_ratio_",
    "mean_",
    "var_",
]


def data(tokens: int = 400, features: int = 40, **options: object) -> Tensor:
    return with_spectrum(tokens, features, decaying(features, 2.0), offset=20.0, **options)


def fitted(x: Tensor, method: str, k: int | None = 6, size: int = 100) -> IncrementalPCA:
    pca = IncrementalPCA(k, method=method)
    for batch in x.split(size):
        pca.partial_fit(batch)
    return pca


@pytest.mark.parametrize("method", METHODS)
def test_attributes_are_those_of_scikit_learn(method: str):
    x = data()
    ours = fitted(x, method)
    theirs = sklearn.decomposition.PCA(6, svd_solver="full").fit(x.double().numpy())
    stream = sklearn.decomposition.IncrementalPCA(6, batch_size=100).fit(x.double().numpy())
    for name in ATTRIBUTES:
        expected = torch.as_tensor(getattr(stream if name == "var_" else theirs, name))
        found = getattr(ours, name)
        assert found.shape == expected.shape, name
        assert found.dtype == torch.float32, name
        if name == "components_":
            assert float((found.double() * expected).sum(1).abs().min()) >= 1 - 1e-4
        else:
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert ours.n_samples_seen_ == stream.n_samples_seen_ == 400
    assert isinstance(ours.noise_variance_, float)
    assert ours.noise_variance_ == pytest.approx(theirs.noise_variance_, rel=1e-3)
    assert ours.n_features_in_ == 40


@pytest.mark.parametrize("method", METHODS)
def test_largest_entry_of_each_component_is_positive(method: str):
    rows = fitted(data(), method).components_
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()
    mirrored = fitted(-data(), method).components_
    torch.testing.assert_close(mirrored, rows, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_fit_captures_as_much_variance_as_exact_pca(method: str):
    x = data(903)
    pca = IncrementalPCA(6, method=method, batch_size=200).fit(x)
    assert pca.n_samples_seen_ == 903
    assert lost_variance(x, pca.components_) <= 1e-6
    assert pca.fit(x[:300]).n_samples_seen_ == 300  # fit starts anew
    again = IncrementalPCA(6, method=method).fit(x, batch_size=200)
    assert torch.equal(pca.fit(x).components_, again.components_)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("tokens", "expected"), [(7, 7), (90, 12)])
def test_default_number_of_components(method: str, tokens: int, expected: int):
    x = torch.randn(tokens, 12)
    pca = IncrementalPCA(method=method).partial_fit(x)
    assert pca.components_.shape == (expected, 12)
    kept = min(expected, tokens - 1)
    assert relative(pca.singular_values_[:kept], exact(x)[0][:kept]) <= 1e-5
    if expected == 12:
        assert pca.noise_variance_ == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_small_batches_after_the_first(method: str):
    x = with_spectrum(200, 40, [9.0, 5.0, 2.0], dtype=torch.float64)
    pca = fitted(x[:30], method)
    for batch in x[30:-1].split(3):
        pca.partial_fit(batch)
    pca.partial_fit(x[-1])  # a single row
    assert pca.n_samples_seen_ == 200
    assert relative(pca.singular_values_[:3], exact(x)[0][:3]) <= 1e-9
    torch.testing.assert_close(pca.var_, x.var(0, correction=0))


@pytest.mark.parametrize("method", METHODS)
def test_float64_input_gives_float64_results(method: str):
    x = with_spectrum(200, 40, decaying(5), dtype=torch.float64)
    pca = fitted(x, method, k=5)
    assert {getattr(pca, name).dtype for name in ATTRIBUTES} == {torch.float64}
    assert relative(pca.singular_values_, exact(x)[0][:5]) <= 1e-10
    assert orthonormality(pca.components_) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(dtype: torch.dtype):
    x = with_spectrum(300, 32, decaying(32, 1.5)).to(dtype)
    pca = fitted(x, "gram")
    assert pca.components_.dtype == torch.float32
    assert relative(pca.singular_values_, exact(x)[0][:6]) <= 1e-5
    assert relative(pca.var_, x.double().var(0, correction=0)) <= 1e-6


def test_arrays_lists_and_integers():
    x = data().numpy()
    expected = fitted(data(), "sketch", size=400)
    assert torch.equal(IncrementalPCA(6, method="sketch").partial_fit(x).mean_, expected.mean_)
    whole = np.random.default_rng(0).integers(-50, 50, (60, 8))
    for values in (whole, torch.as_tensor(whole), whole.tolist()):
        pca = IncrementalPCA(8, method="gram").partial_fit(values)
        assert pca.components_.dtype == torch.float64
        assert relative(pca.singular_values_, exact(torch.as_tensor(whole))[0]) <= 1e-5


def test_later_batches_of_another_dtype():
    x = data(dtype=torch.float64)
    pca = IncrementalPCA(6).partial_fit(x[:200].float()).partial_fit(x[200:])
    assert pca.components_.dtype == torch.float32
    assert pca.n_samples_seen_ == 400


@pytest.mark.parametrize("method", METHODS)
def test_mask(method: str):
    x = data()
    keep = torch.rand(400) > 0.3
    broken = x.clone()
    broken[~keep] = float("nan")
    pca = IncrementalPCA(6, method=method)
    assert pca.partial_fit(broken[:5], mask=torch.zeros(5)) is pca
    assert pca.n_samples_seen_ == 0
    pca.partial_fit(broken.view(4, 100, 40), mask=keep.view(4, 100))
    assert pca.n_samples_seen_ == int(keep.sum())
    plain = IncrementalPCA(6, method=method).partial_fit(x[keep])
    torch.testing.assert_close(pca.singular_values_, plain.singular_values_, rtol=1e-5, atol=0)
    torch.testing.assert_close(pca.var_, plain.var_)
    with pytest.raises(EvaValueError, match="batch number of samples 3"):
        IncrementalPCA(6, method=method).partial_fit(x, mask=torch.arange(400) < 3)
    for entries in (3, 7):
        with pytest.raises(EvaValueError, match=f"mask has {entries} entries for 5 rows"):
            pca.partial_fit(x[:5], mask=torch.ones(entries))


def test_transform():
    x = data(dtype=torch.float64)
    pca = fitted(x, "gram")
    found = pca.transform(x[:9].numpy())
    expected = sklearn.decomposition.PCA(6).fit(x.numpy()).transform(x[:9].numpy())
    torch.testing.assert_close(found.abs(), torch.as_tensor(expected).abs(), rtol=1e-6, atol=1e-8)
    assert relative(IncrementalPCA(6, method="gram").fit_transform(x)[:9], found) <= 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_merge(method: str):
    x = data(dtype=torch.float64)
    x[250:] += 5
    left, right = fitted(x[:250], method), fitted(x[250:], method)
    before = right.components_.clone()
    assert left.merge(right) is left
    assert left.n_samples_seen_ == 400
    assert torch.equal(right.components_, before)
    assert lost_variance(x, left.components_) <= 1e-5
    torch.testing.assert_close(left.mean_, x.mean(0))
    torch.testing.assert_close(left.var_, x.var(0, correction=0))
    empty = IncrementalPCA(6, method=method)
    assert left.merge(IncrementalPCA(6)).n_samples_seen_ == 400
    assert torch.equal(empty.merge(left).components_, left.components_)
    torch.testing.assert_close(empty.var_, left.var_)


@pytest.mark.parametrize("method", METHODS)
def test_merge_does_not_change_the_other(method: str):
    x = data()
    right, same = (IncrementalPCA(6, method=method).partial_fit(x[:60]) for _ in "ab")
    for pca in (right, same):
        pca.partial_fit(x[60:65])  # too few for a step
    fitted(x[70:], method).merge(right)
    empty = IncrementalPCA(6, method=method).merge(right)
    empty.partial_fit(x[70:])
    for pca in (right, same):
        pca.partial_fit(x[65:70])
        pca.partial_fit(x[100:])
    assert right.n_samples_seen_ == same.n_samples_seen_ == 370
    assert torch.equal(right.components_, same.components_)


def test_attributes_are_updated_by_a_merge():
    x = data(dtype=torch.float64)
    left, right = fitted(x[:200], "gram"), fitted(x[200:] + 50, "gram")
    before = left.singular_values_
    assert left.components_ is left.components_  # computed once
    left.merge(right)
    assert (left.singular_values_ > before).all()


def test_variance_of_features_with_large_mean():
    x = torch.randn(300, 20, dtype=torch.float64)
    far = IncrementalPCA(4).partial_fit(x[:100] + 1e9).partial_fit(x[100:] + 1e9)
    assert relative(far.var_, x.var(0, correction=0)) <= 1e-5


def test_two_rows():
    x = data(dtype=torch.float64)[:2]
    ours, theirs = IncrementalPCA(1).fit(x, batch_size=1), sklearn.decomposition.PCA(1).fit(x)
    found = ours.explained_variance_.item(), ours.var_.sum().item(), ours.noise_variance_
    spread = (x[0] - x[1]).square().sum().item()
    assert found == pytest.approx((theirs.explained_variance_.item(), spread / 4, 0), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_noise_variance_is_never_negative(seed: int):
    torch.manual_seed(seed)  # by rounding, slightly more or less variance is captured than exists
    x = torch.randn(100, 3) @ torch.randn(3, 20)
    assert 0 <= IncrementalPCA(5).fit(x).noise_variance_ <= 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_only_the_bad_batch_is_refused_on_an_accelerator(
    method: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    x = data()
    pca = fitted(x, method)
    with pytest.raises(NonFiniteError, match="1 of 3 tokens holds NaN or infinity; impute or"):
        pca.partial_fit(torch.cat([x[:2], x[:1] / 0]))
    assert pca.n_samples_seen_ == 400


@pytest.mark.parametrize("method", METHODS)
def test_refused_merge_changes_nothing(method: str):
    x = data()
    left = fitted(x, method)
    before = left.var_.clone()
    with pytest.raises(EvaValueError, match="cannot be merged"):
        left.merge(fitted(x, *({*METHODS} - {method})))
    with pytest.raises(EvaValueError, match="cannot merge 40 features and sketch width 8"):
        left.merge(fitted(x, method, k=4))
    with pytest.raises(EvaValueError, match="cannot merge 30 features and sketch width 12"):
        left.merge(fitted(x[:, :30], method))
    assert torch.equal(left.var_, before)


def sklearn_message(k: int, *shapes: tuple[int, int]) -> str:
    """Return the message of scikit-learn's error for batches of these shapes."""
    pca = sklearn.decomposition.IncrementalPCA(k)
    *accepted, refused = [np.random.default_rng(0).normal(size=shape) for shape in shapes]
    for x in accepted:
        pca.partial_fit(x)
    with pytest.raises(ValueError) as caught:
        pca.partial_fit(refused)
    return str(caught.value)


@pytest.mark.parametrize(
    ("k", "shapes", "words"),
    [
        (9, [(50, 8)], "n_components=9 invalid for n_features=8"),
        (6, [(5, 8)], "n_components=6 must be less or equal to the batch number of samples 5"),
        (3, [(9, 8), (9, 7)], "X has 7 features, but IncrementalPCA is expecting 8 features"),
    ],
)
def test_errors_are_those_of_scikit_learn(k: int, shapes: list[tuple[int, int]], words: str):
    assert words in sklearn_message(k, *shapes)
    pca = IncrementalPCA(k)
    *accepted, refused = [torch.randn(shape) for shape in shapes]
    for x in accepted:
        pca.partial_fit(x)
    with pytest.raises(EvaValueError, match=words):
        pca.partial_fit(refused)


def test_other_errors():
    with pytest.raises(EvaValueError, match="method='svd' is unknown"):
        IncrementalPCA(3, method="svd")
    with pytest.raises(EvaValueError, match=r"got an array of shape \(0, 4\)"):
        IncrementalPCA(3).partial_fit(torch.empty(0, 4))
    with pytest.raises(EvaTypeError, match="complex"):
        IncrementalPCA(3).partial_fit(torch.ones(5, 4, dtype=torch.complex64))
    with pytest.raises(EvaTypeError, match="complex"):
        IncrementalPCA(3).partial_fit(np.ones((5, 4), complex)[::-1])
    for thing in (data(), sklearn.decomposition.IncrementalPCA(3), None):
        with pytest.raises(EvaTypeError, match=r"cannot merge \w+ into .*; pass another Incr"):
            IncrementalPCA(3).merge(thing)


def test_not_fitted_error_before_the_first_data():
    words = "has not seen any data; call fit or partial_fit first"
    for kind in (EvaValueError, AttributeError):
        with pytest.raises(kind, match=words) as caught:
            _ = IncrementalPCA(3).components_
        theirs = sklearn.exceptions.NotFittedError.__bases__
        assert all(isinstance(caught.value, base) for base in theirs)
    for call in (IncrementalPCA.transform, IncrementalPCA.inverse_transform):
        with pytest.raises(EvaValueError, match=words):
            call(IncrementalPCA(3), data())
    names = [name for name in dir(IncrementalPCA) if name.endswith("_") and name[0] != "_"]
    assert len(names) > 8
    found = [name for name in names if hasattr(IncrementalPCA(3), name)]
    assert found == ["n_samples_seen_"]


def test_refused_batch_changes_nothing():
    x = data()
    broken = x[:50].clone()
    broken[3, 3] = float("inf")
    pca = IncrementalPCA(6)
    with pytest.raises(NonFiniteError, match=r"1 of 50 .*; impute or drop those rows, .* mask="):
        pca.partial_fit(broken)
    with pytest.raises(NonFiniteError, match="or leave them out by mask= of partial_fit"):
        IncrementalPCA(6).partial_fit(broken, mask=torch.arange(50) < 40)
    assert pca.n_samples_seen_ == 0
    pca.partial_fit(x[:, :30])  # another width is allowed, as nothing was fitted yet
    with pytest.raises(NonFiniteError):
        pca.partial_fit(broken[:, :30])
    assert pca.n_samples_seen_ == 400
    assert torch.equal(pca.components_, IncrementalPCA(6).partial_fit(x[:, :30]).components_)


def test_same_bits_for_the_same_seed_only():
    x = data()
    assert torch.equal(fitted(x, "sketch").components_, fitted(x, "sketch").components_)
    other = IncrementalPCA(6, method="sketch", seed=1).fit(x, batch_size=100)
    assert not torch.equal(other.components_, fitted(x, "sketch").components_)
    assert lost_variance(x, other.components_) <= 1e-5


def test_reusing_the_input_buffer_does_not_change_the_fit():
    x = data(dtype=torch.float64)
    for buffer in (torch.empty(100, 40, dtype=torch.float64), np.empty((100, 40))):
        pca = IncrementalPCA(6)
        for batch in x.split(100):
            torch.as_tensor(buffer)[:] = batch
            pca.partial_fit(buffer)
        torch.testing.assert_close(pca.var_, x.var(0, correction=0))
    assert len(pickle.dumps(pca._pivot)) < 100 * 40 * 8  # no reference to a whole batch is kept


def test_array_strides_byte_order_and_integer_types():
    x = np.random.default_rng(0).normal(size=(40, 6)) * np.arange(1, 7)
    plain = IncrementalPCA(4).fit(np.ascontiguousarray(x[::-1]))
    for other in (x[::-1], np.asfortranarray(x[::-1]), x[::-1].astype(">f8"), x[::-1].tolist()):
        found = IncrementalPCA(4).fit(other)
        assert found.components_.dtype == torch.float64
        assert torch.equal(found.components_, plain.components_)
    one_row = x[::-1][3:4]  # whose negative stride means nothing
    assert torch.equal(plain.transform(one_row), plain.transform(one_row.copy()))
    whole = (1000 * x).astype(np.int64) + 10**9  # beyond the precision of float32
    kinds = [whole.astype(kind) for kind in (">i8", np.uint32, np.uint64)]
    for integers in (whole, *kinds, whole.tolist()):
        values = IncrementalPCA(4).fit(integers).explained_variance_
        exact = np.linalg.eigvalsh(np.cov(whole.T.astype(np.float64)))[::-1][:4]
        np.testing.assert_allclose(values.numpy(), exact, rtol=1e-6)
    flags = (x > 0)[::-1]
    numbers = IncrementalPCA(4).fit(flags.astype(np.float64))
    assert torch.equal(IncrementalPCA(4).fit(flags).components_, numbers.components_)

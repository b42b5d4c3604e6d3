"""The Triton kernels: tiles, splits, memory, precision, registration."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from eva_kernels import reference
from eva_kernels.errors import EvaRuntimeError, EvaValueError
from eva_kernels.ops import (
    backend_report,
    gram,
    gram_workspace_bytes,
    sketch,
    sketch_workspace_bytes,
)
from eva_kernels.ops._dispatch import choose_backend, triton_unavailable
from helpers import PLANES, relative

triton = pytest.importorskip("triton")
launch = pytest.importorskip("eva_kernels.kernels.launch")
kernel = pytest.importorskip("eva_kernels.kernels.sketch")
primitives = pytest.importorskip("eva_kernels.kernels.primitives")
sketch_plan = pytest.importorskip("eva_kernels.kernels.sketch_plan")
pytestmark = pytest.mark.skipif(
    triton_unavailable("cuda" if torch.cuda.is_available() else "cpu") is not None,
    reason="Triton neither runs nor is interpreted here",
)
sum_all, to_bf16, tl = primitives.sum_all, primitives.to_bf16, triton.language
SHORT = [torch.bfloat16, torch.float16, torch.float32]


def arguments(x: Tensor, q: int, pivot: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return basis, pivot and empty sums in float32."""
    d = x.shape[1]
    basis = torch.linalg.qr(torch.randn(d, q, dtype=torch.float64))[0].mT.contiguous().float()
    pivot = torch.zeros(d) if pivot is None else pivot.float().cpu()
    wide = torch.float64
    sums = (torch.zeros(q, d), torch.zeros(d, dtype=wide), torch.zeros((), dtype=wide))
    return tuple(t.to(x.device) for t in (basis, pivot, *sums))


def errors(x: Tensor, q: int, pivot: Tensor | None = None, **options) -> list[float]:
    """Return the errors of products, shift and square against float64.

    Relative to their norms; that of the shift, which may be zero, to the sums of magnitudes.
    """
    basis, pivot, *sums = arguments(x, q, pivot)
    rows = options.get("rows")
    sketch(x, basis, pivot, *sums, backend="triton", **options)
    expected = [torch.zeros_like(part, dtype=torch.float64) for part in sums]
    reference.sketch(x.double(), basis.double(), pivot.double(), *expected, rows)
    centred = (x if rows is None else x[rows]).double() - pivot.double()
    magnitude = centred.abs().sum(0).norm()
    shift = float((sums[1] - expected[1]).norm() / magnitude)
    return [relative(sums[0], expected[0]), shift, relative(sums[2], expected[2])]


def decaying(n: int, d: int, device: torch.device) -> Tensor:
    """Return tokens whose features have scales of 1 to 1/30, and a nonzero mean."""
    scales = torch.logspace(0, -1.5, d)[torch.randperm(d)]
    return (torch.randn(n, d) * scales + 0.3 * torch.randn(d)).to(device)


@triton.jit
def round_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    tl.store(out_ptr + offset, to_bf16(tl.load(x_ptr + offset)))


def test_rounding_to_bfloat16_equals_torch(device: torch.device):
    # Ties to the next below and above, values beside them, the largest numbers, NaN and infinity.
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x7F7F8000, 0x7F7F7FFF, 0x00818000]
    bits += [0x00808000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    bits += [0, 0x00800000, 0x3F800000]
    x = torch.tensor(bits + [b - 2**31 for b in bits], dtype=torch.int32, device=device)
    x = x.view(torch.float32)
    found = torch.empty(32, dtype=torch.bfloat16, device=device)
    round_kernel[(1,)](x, found, 32)
    expected, none = x.bfloat16(), x.isnan()
    assert torch.equal(found.isnan(), none)
    assert torch.equal(found[~none].view(torch.int16), expected[~none].view(torch.int16))


@pytest.fixture(params=sorted(launch.ARCHS))
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Use the launch parameters of every architecture in turn."""
    if torch.cuda.is_available():
        pytest.skip("the device has its own launch parameters")
    monkeypatch.setattr(launch, "arch_of", lambda device: launch.ARCHS[request.param])
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_of_every_architecture(arch: str, dtype: torch.dtype, device: torch.device):
    x = decaying(115, 193, device)
    x[:, 100] += 80  # a block of features that is centred first
    x = x.to(dtype)
    for q in (40, 130):
        assert max(errors(x, q, pivot=x.float().mean(0))) <= PLANES["high"]
    scatter = torch.zeros(193, 193)
    shift, square = torch.zeros(193, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    gram(x, torch.zeros(193), scatter, shift, square, backend="triton")
    assert relative(scatter, x.double().mT @ x.double()) <= PLANES["high"]
    assert torch.equal(scatter.triu(128), scatter.tril(-128).mT)


def test_tiles_are_multiples_of_flag_blocks():
    # project skips blocks of flags; back and collect centre whole tiles of blocks
    flags = sketch_plan.FLAG_BLOCK.value
    for by_width in launch.SKETCH_TILES.values():
        assert list(by_width) == [64, 128, 256]
        for tiles in by_width.values():
            for centred in (False, True):
                project, back = tiles.project_and_back(centred)
                assert project.block_d == flags
                assert back.block_d % flags == 0


@pytest.mark.parametrize("q", [16, 128, 200, 256])
@pytest.mark.parametrize("dtype", SHORT)
def test_sketch_widths(q: int, dtype: torch.dtype, device: torch.device):
    assert max(errors(decaying(97, 257, device).to(dtype), q)) <= PLANES["high"]


@pytest.mark.parametrize(("n", "d"), [(1, 16), (40, 4096), (3000, 64), (64, 1025)])
def test_splits_over_features_and_tokens(n: int, d: int, device: torch.device):
    plan = sketch_plan.plan_sketch(n, 16, d, False, launch.arch_of(device))
    assert (plan.splits_d > 1) == (d > 1000)
    assert (plan.splits_n > 1) == (n == 3000)
    x = decaying(n, d, device).bfloat16()
    assert max(errors(x, 16, pivot=x.float().mean(0) + 0.1)) <= PLANES["high"]


@pytest.mark.parametrize("where", ["end of a split", "begin of a split", "last feature"])
def test_offset_in_any_split(where: str, device: torch.device):
    n, d = 64, 1025
    plan = sketch_plan.plan_sketch(n, 16, d, False, launch.arch_of(device))
    assert plan.splits_d > 2
    border = plan.blocks_d * plan.project.block_d
    feature = {"end of a split": border - 1, "begin of a split": border, "last feature": d - 1}
    x = decaying(n, d, device)
    x[:, feature[where]] = 80000 + 512.0 * (torch.arange(n, device=device) % 2)
    x = x.bfloat16()
    assert max(errors(x, 16, pivot=x.float().mean(0))) <= PLANES["high"]


def test_splits_fill_the_chip():
    narrow, wide = launch.Tile(64, 128, 4, 3), launch.Tile(64, 128, 8, 3)
    splits, hopper = launch.splits_to_fill, launch.ARCHS["sm_90"]
    assert splits(64, 64, 16, narrow, hopper) == 4  # 256 programs, of 264 that run at once
    assert splits(64, 64, 16, wide, hopper) == 2
    # 86 programs leave a third idle, and twice as many need a second round for a few
    assert splits(86, 128, 32, wide, hopper) == 3
    assert splits(86, 128, 2, wide, hopper) == 1
    assert splits(1, 5, 100, narrow, hopper) == 5  # no more splits than rounds
    assert splits(1, 5, 0, narrow, hopper) == splits(1000, 64, 16, narrow, hopper) == 1


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("kind", ["one feature", "all features", "rare", "signs"])
@pytest.mark.parametrize("precision", ["high", "fast"])
def test_offsets_and_outliers(kind: str, dtype: torch.dtype, precision: str, device: torch.device):
    x = decaying(300, 250, device)
    if kind == "one feature":
        x[:, 100] = 800 + torch.randn(300, device=device)
    elif kind == "all features":
        x += 800
    elif kind == "rare":
        x[::100, 70] = 800.0
    else:
        x[:, 70] = 800 * torch.randn(300, device=device).sign()
    x = x.to(dtype)
    found = errors(x, 64, pivot=x[:75].float().mean(0), precision=precision)
    assert found[0] <= PLANES[precision]
    assert max(found[1:]) <= 1e-5


@pytest.mark.parametrize("chosen", [False, True])
def test_block_is_centred_from_sixteen_times_its_spread(chosen: bool, device: torch.device):
    # About the pivot, tokens deviate by 1, the last quarter by 3: a spread of the root of 3.
    pivot = torch.zeros(200)
    pivot[[30, 100, 195]] = torch.tensor([27.0, -29.0, 11.0])
    steps = torch.where(torch.arange(320) < 240, 1.0, 3.0)[:, None]
    x = (pivot + steps * torch.randn(320, 200).sign()).bfloat16().to(device)
    x[:, 128:192] = 0  # constant zeros are no reason to centre
    rows = None
    if chosen:
        x = x.repeat_interleave(2, 0)
        x[1::2] = float("nan")
        rows = torch.arange(0, 640, 2, device=device)
    plan = sketch_plan.plan_sketch(320, 16, 200, False, launch.arch_of(device))
    workspace = torch.empty(plan.nbytes, dtype=torch.uint8, device=device)
    torch.ops.eva_kernels.sketch(x, *arguments(x, 16, pivot), workspace, rows, True)
    flags = workspace[plan.offsets["flags"] :][:16].view(torch.int32)
    # The last block has 8 of 64 features; the missing ones count as no deviation.
    assert flags.tolist() == [0, 1, 0, 1]


def test_without_centring_an_offset_loses_precision(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
):
    if torch.cuda.is_available():
        pytest.skip("compiled kernels do not see the change")
    monkeypatch.setattr(kernel, "LARGE_OFFSET", kernel.tl.constexpr(1e15))
    x = (decaying(300, 250, device) + 800).bfloat16()
    assert errors(x, 64, pivot=x[:75].float().mean(0))[0] > 1e-4


def padded_with_filler(tensor: Tensor, filler: float = float("nan")) -> tuple[Tensor, Tensor]:
    """Return a copy of a tensor between filler values, and the whole memory."""
    memory = torch.full((tensor.numel() + 128,), filler, dtype=tensor.dtype, device=tensor.device)
    memory[64:-64] = tensor.flatten()
    return memory[64:-64].view(tensor.shape), memory


def untouched(memories: Sequence[Tensor]) -> bool:
    """Return whether the memory around all tensors is still NaN."""
    return all(
        bool(part.isnan().all()) for memory in memories for part in (memory[:64], memory[-64:])
    )


@pytest.mark.parametrize("q", [20, 64])  # fewer rows than a tile, and as many
@pytest.mark.parametrize("dtype", SHORT)
def test_sketch_reads_and_writes_only_its_memory(dtype: torch.dtype, q: int, device: torch.device):
    x = decaying(130, 193, device)
    x[:, 70] += 80  # a block of features that is centred first
    x = x.to(dtype)
    # Everything lies in a larger memory of NaN, and scratch memory starts as NaN.
    given, memories = zip(*map(padded_with_filler, arguments(x, q, pivot=x[1])), strict=True)
    x[129] = float("nan")
    rows, _ = padded_with_filler(torch.arange(0, 129, 3, device=device), 129)
    nbytes = sketch_workspace_bytes(len(rows), q, 193, dtype, device)
    scratch = torch.full((nbytes + 515,), 255, dtype=torch.uint8, device=device)
    workspace = scratch[256 : 256 + nbytes + 3]  # larger than needed, and not a multiple of 4
    torch.ops.eva_kernels.sketch(x, *given, workspace, rows, True)
    expected = [torch.zeros_like(part, dtype=torch.float64) for part in given[2:]]
    reference.sketch(x.double(), given[0].double(), given[1].double(), *expected, rows)
    assert max(map(relative, given[2:], expected)) <= PLANES["high"]
    assert untouched(memories)
    assert (scratch[:256] == 255).all()
    assert (scratch[256 + nbytes :] == 255).all()
    # No token after the last row was read, either.
    centred = dtype != torch.bfloat16
    plan = sketch_plan.plan_sketch(len(rows), q, 193, centred, launch.arch_of(device))
    begin, end = plan.offsets["projected"], plan.offsets["p_high"]
    projected = workspace[begin:end].view(torch.float32).view(-1, plan.pitch)
    assert not projected[: plan.splits_d * plan.block_q, len(rows) :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_reads_and_writes_only_its_memory(dtype: torch.dtype, device: torch.device):
    x, wide = decaying(700, 40, device).to(dtype), torch.float64
    sums = torch.zeros(40, 40), torch.zeros(40, dtype=wide), torch.zeros((), dtype=wide)
    given, memories = zip(
        *(padded_with_filler(t.to(device)) for t in (x[1].float(), *sums)), strict=True
    )
    x[699] = float("nan")
    rows, _ = padded_with_filler(torch.arange(699, device=device), 699)
    nbytes = gram_workspace_bytes(699, 40, dtype, device)
    scratch = torch.full((nbytes + 512,), 255, dtype=torch.uint8, device=device)
    workspace = scratch[256 : 256 + nbytes]
    torch.ops.eva_kernels.gram(x, *given, workspace, rows, True)
    assert (workspace != 255).any()
    expected = [torch.zeros_like(part, dtype=wide) for part in given[1:]]
    reference.gram(x.double(), given[0].double(), *expected, rows)
    assert max(map(relative, given[1:], expected)) <= PLANES["high"]
    assert untouched(memories)
    assert (scratch[:256] == 255).all()
    assert (scratch[256 + nbytes :] == 255).all()


@triton.jit
def sum_kernel(x_ptr, out_ptr, count):
    tl.store(out_ptr, sum_all(x_ptr, count))


@pytest.mark.parametrize("count", [1, 1024, 3000])
def test_long_sums_are_in_float64(count: int, device: torch.device):
    x = torch.ones(count, device=device)
    x[0] = 2.0**26  # float32 cannot represent this number plus one
    given, found = padded_with_filler(x)[0], torch.zeros((), dtype=torch.float64, device=device)
    sum_kernel[(1,)](given, found, count)
    assert found.item() == 2**26 + count - 1


def test_rows_beyond_32_bits_of_address(device: torch.device):
    # 4 GiB of which three rows are touched; the last begins 2**31 elements in.
    store = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    x = store.as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64))
    assert max(errors(x, 16)) <= PLANES["high"]
    assert max(errors(x, 16, rows=torch.tensor([2, 0], device=device))) <= PLANES["high"]


def test_misaligned_tokens(device: torch.device):
    x = torch.randn(101 * 65 + 1, device=device).bfloat16()[1:].view(101, 65)[:, 1:]
    assert max(errors(x, 16)) <= PLANES["high"]


def test_registered_operators_pass_opcheck(device: torch.device):
    x = torch.randn(70, 33, device=device).bfloat16()
    rows = torch.arange(0, 70, 2, device=device)
    basis, pivot, *sums = arguments(x, 17)
    nbytes = sketch_workspace_bytes(70, 17, 33, x.dtype, device)
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=device)
    for index in (None, rows):
        torch.library.opcheck(
            torch.ops.eva_kernels.sketch, (x, basis, pivot, *sums, workspace, index, True)
        )
    workspace = torch.empty(
        gram_workspace_bytes(70, 33, x.dtype, device), dtype=torch.uint8, device=device
    )
    scatter = torch.zeros(33, 33, device=device)
    torch.library.opcheck(
        torch.ops.eva_kernels.gram, (x, pivot, scatter, *sums[1:], workspace, None, False)
    )


def test_torch_compile_keeps_one_operator(device: torch.device):
    x = torch.randn(70, 33, device=device).bfloat16()
    basis, pivot, *sums = arguments(x, 17)
    nbytes = sketch_workspace_bytes(70, 17, 33, x.dtype, device)
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=device)
    targets = []

    def remember(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        targets.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    @torch.compile(backend=remember, fullgraph=True)
    def step(x: Tensor) -> Tensor:
        torch.ops.eva_kernels.sketch(x, basis, pivot, *sums, workspace, None, True)
        return x + 1

    step(x)
    assert any("eva_kernels.sketch" in name for name in targets)
    assert sums[0].any()


@pytest.mark.parametrize(
    ("shape", "dtype", "q", "reason"),
    [
        ((20, 33), torch.float64, 17, "tokens of torch.float64 with sums of torch.float64"),
        ((20, 8), torch.float32, 4, "8 features are fewer than the 16"),
        ((20, 300), torch.float32, 257, "a width of 257 is above 256"),
    ],
)
def test_unsupported_input_raises_or_falls_back(
    shape: tuple[int, int], dtype: torch.dtype, q: int, reason: str, device: torch.device
):
    x = torch.randn(shape, dtype=dtype, device=device)
    basis, pivot, *sums = arguments(x, q)
    wide = dtype == torch.float64
    basis, pivot, sums[0] = (t.to(dtype) if wide else t for t in (basis, pivot, sums[0]))
    with pytest.raises(EvaRuntimeError, match=f"cannot run sketch: {reason}"):
        sketch(x, basis, pivot, *sums, backend="triton")
    sketch(x, basis, pivot, *sums)
    expected = (basis.double() @ x.double().mT) @ x.double()
    assert relative(sums[0], expected) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(3, dtype=torch.int32)}, "rows must be a vector of torch.int64"),
        ({"rows": torch.zeros(3, 1, dtype=torch.int64)}, "rows must be a vector"),
        ({"rows": torch.zeros(3, dtype=torch.int64, device="meta")}, "rows on meta"),
        ({"products": torch.zeros(33, 17).mT}, r"products must be contiguous, strides are \(1"),
        ({"shift": torch.zeros(66, dtype=torch.float64)[::2]}, "shift must be contiguous"),
    ],
)
def test_invalid_arguments(change: dict, message: str):
    if torch.cuda.is_available():
        pytest.skip("the arguments are on the CPU, which is not interpreted here")
    x = torch.randn(50, 33)
    names = ("basis", "pivot", "products", "shift", "square")
    given = dict(zip(names, arguments(x, 17), strict=True)) | change
    with pytest.raises(EvaValueError, match=message):
        sketch(x, **given, backend="triton")


@pytest.mark.parametrize("name", ["scatter", "shift"])
def test_strided_sums_raise(name: str, device: torch.device):
    x, wide = torch.randn(50, 33, device=device), {"dtype": torch.float64, "device": device}
    given = {"pivot": x[0], "scatter": torch.zeros(33, 33, device=device)}
    given |= {"shift": torch.zeros(33, **wide), "square": torch.zeros((), **wide)}
    given[name] = torch.stack([given[name]] * 2, -1)[..., 0]
    with pytest.raises(EvaValueError, match=f"{name} must be contiguous"):
        gram(x, **given, backend="triton")


def test_auto_does_not_interpret_kernels():
    x = torch.randn(50, 33)
    assert choose_backend("sketch", "auto", x, torch.float32, 17) == "torch"
    if not torch.cuda.is_available():
        rows = {op: (backend, reason) for op, backend, reason in backend_report()}
        assert rows["sketch"] == rows["gram"] == ("torch", "tensors are on the CPU")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SHORT)
def test_auto_uses_triton_on_a_gpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
):
    def fail(*_args: object) -> None:
        raise AssertionError("plain PyTorch ran")

    monkeypatch.setattr(reference, "sketch", fail)
    monkeypatch.setattr(reference, "gram", fail)
    x = torch.randn(512, 1024, device=device).to(dtype)
    basis, pivot, *sums = arguments(x, 64)
    sketch(x, basis, pivot, *sums)
    gram(x, pivot, torch.zeros(1024, 1024, device=device), *sums[1:])
    torch.cuda.synchronize()
    assert sums[0].any()
    assert {op: backend for op, backend, _ in backend_report()}["sketch"] == "triton"

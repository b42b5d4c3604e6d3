"""Launches by native code: arguments of the kernels, and when Triton must launch them itself."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eva_kernels import _C, _native

sequence = pytest.importorskip("eva_kernels.kernels.sequence")
PLACES = {"x": (sequence.GIVEN, 0), "rows": (sequence.GIVEN, 1), "part": (sequence.WORKSPACE, 48)}
SIGNATURE = {"x": "*bf16", "rows": "constexpr", "part": "*fp32", "n": "i32", "one": "constexpr"}
META = {
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
    "num_ctas": 1,
    "launch_cooperative_grid": False,
    "num_warps": 4,
    "shared": 640,
    "launch_pdl": True,
}


class Compiled:
    """A compiled Triton kernel, whose code lives as long as this object."""

    def __init__(self, **meta: Any) -> None:
        """Store META with changes; a value of None removes its key."""
        known = {name: value for name, value in (META | meta).items() if value is not None}
        self.metadata = SimpleNamespace(**known)
        constants = {(1,): None, (4,): 1, (5,): 64}
        signature = SIGNATURE | {"BLOCK": "constexpr"}
        self.src = SimpleNamespace(signature=signature, constants=constants)
        self.function = 7


class CompiledByTriton32(Compiled):
    """A kernel compiled by Triton 3.2, whose signature has no constexpr and types constants."""

    def __init__(self) -> None:
        super().__init__(**dict.fromkeys(META.keys() - {"num_ctas", "num_warps", "shared"}))
        signature = SIGNATURE | {"rows": "*i8", "one": "i32"}
        constants = {"rows": None, "one": 1, "BLOCK": 64}
        self.src = SimpleNamespace(signature=signature, constants=constants)

    def __getitem__(self, grid: Any) -> Any:
        def launch(x: int, rows: None, part: int, n: int, one: int, *, stream: int) -> None:
            self.launched = grid, x, rows, part, n, one, stream

        return launch


def native_list(sizes: list[int] | Exception, **meta: Any) -> Any:
    """Return the native list of one kernel with these parameter sizes, or ``None`` if refused."""

    def parameter_sizes(function: int) -> list[int]:
        if isinstance(sizes, Exception):
            raise sizes
        return sizes

    module = SimpleNamespace(LaunchList=_C.LaunchList, parameter_sizes=parameter_sizes)
    kernel = SimpleNamespace(arg_names=[*SIGNATURE, "BLOCK"])
    call = sequence.Call(kernel, (3, 2), ("x", "rows", "part"), (-5, 1), {"BLOCK": 64}, {})
    return sequence.native_launches(module, [call], [Compiled(**meta)], PLACES)


@pytest.mark.parametrize("scratch", [0, 1, 2])
@pytest.mark.parametrize(
    "unknown",  # Triton 3.3 and 3.4 lack profile_scratch_size, 3.2 lacks all of these
    [(), ("profile_scratch_size",), (*META.keys() - {"num_ctas", "num_warps", "shared"},)],
)
def test_kernel_gets_pointers_numbers_and_scratch(scratch: int, unknown: tuple[str, ...]):
    found = native_list([8, 8, 4] + [8] * scratch, **dict.fromkeys(unknown)).resolve(
        [1024, 0], 4096
    )
    [(function, grid, threads, shared, early, values)] = found
    assert (function, grid, threads, shared) == (7, [3, 2, 1], 128, 640)
    assert early == ("launch_pdl" not in unknown)
    assert values == [1024, 4096 + 48, 2**64 - 5] + [0] * scratch
    assert values[2] % 2**32 == torch.tensor(-5, dtype=torch.int32).view(torch.uint32)


def call_of_triton_32() -> tuple[Any, CompiledByTriton32]:
    kernel = SimpleNamespace(arg_names=[*SIGNATURE, "BLOCK"])
    call = sequence.Call(kernel, (3, 2), ("x", "rows", "part"), (-5, 1), {"BLOCK": 64}, {})
    return call, CompiledByTriton32()


def test_native_launch_passes_no_constants_to_triton_32_kernels():
    call, compiled = call_of_triton_32()
    module = SimpleNamespace(LaunchList=_C.LaunchList, parameter_sizes=lambda function: [8, 8, 4])
    [found] = sequence.native_launches(module, [call], [compiled], PLACES).resolve([1024, 0], 4096)
    assert found[-1] == [1024, 4096 + 48, 2**64 - 5]


@pytest.fixture
def device_stack(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the stack of current devices."""
    device_stack: list[Any] = [None]

    @contextmanager
    def current_device(device: torch.device) -> Iterator[None]:
        device_stack.append(device)
        yield
        device_stack.pop()

    monkeypatch.setattr(sequence, "current_device", current_device)
    return device_stack


def test_triton_32_launcher_gets_no_constants(
    device_stack: list[Any], monkeypatch: pytest.MonkeyPatch
):
    call, compiled = call_of_triton_32()
    monkeypatch.setattr(sequence._native, "load_or_none", lambda kind: None)
    active = SimpleNamespace(get_current_stream=lambda index: f"stream of {device_stack[-1]}")
    monkeypatch.setattr(sequence, "driver", SimpleNamespace(active=active))
    launches = sequence.LaunchSequence([call], ["x", "rows"], {"part": (48, torch.float32)}, 64)
    launches._make_relauncher([compiled], torch.device("cpu"))([1024, 0], 4096)
    given = 1024, None, 4096 + 48, -5, 1
    assert compiled.launched == ((3, 2, 1), *given, "stream of cpu")


@pytest.mark.parametrize(
    ("sizes", "meta"),
    [
        ([8, 8], {}),
        ([8, 8, 8], {}),
        ([8, 8, 4, 4], {}),
        ([8, 8, 4, 8, 8, 8], {}),
        (RuntimeError("no cuFuncGetParamInfo"), {}),
        ([8, 8, 4, 8, 8], {"global_scratch_size": 16}),
        ([8, 8, 4, 8, 8], {"profile_scratch_size": 16}),
        ([8, 8, 4, 8, 8], {"num_ctas": 2}),
        ([8, 8, 4, 8, 8], {"launch_cooperative_grid": True}),
        ([8, 8, 4, 8, 8], {"num_warps": None}),
    ],
)
def test_unexpected_parameters_or_metadata_are_left_to_triton(sizes: Any, meta: dict[str, Any]):
    assert native_list(sizes, **meta) is None


def test_kernel_without_signature_is_left_to_triton():
    call, compiled = call_of_triton_32()
    compiled.src.signature = {}
    module = SimpleNamespace(LaunchList=_C.LaunchList, parameter_sizes=lambda function: [8, 8, 4])
    assert sequence.native_launches(module, [call], [compiled], PLACES) is None


def test_launch_by_triton_is_logged_once(caplog: pytest.LogCaptureFixture):
    sequence._log_triton_launches.cache_clear()
    with caplog.at_level("INFO", "eva_kernels"):
        for _ in range(2):
            native_list([8, 8, 2])
    [message] = caplog.messages
    assert "launched by Triton" in message
    assert "[8, 8, 2] bytes where [8, 8, 4]" in message


class Kernel:
    """A kernel whose compiled code Triton does not keep after a launch."""

    arg_names = (*SIGNATURE, "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[weakref.ref[Compiled]] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*given: Any, **constants: Any) -> Compiled:
            compiled = Compiled()
            self.compiled.append(weakref.ref(compiled))
            return compiled

        return launch


@pytest.fixture
def native_runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record launches by native code, as on a GPU, with empty caches."""
    native_runs: list[Any] = []

    class Launches(_C.LaunchList):
        def run(self, given: list[int], workspace: int, device: int, stream: int) -> None:
            native_runs.append(self.resolve(given, workspace))

    module = SimpleNamespace(LaunchList=Launches, parameter_sizes=lambda function: [8, 8, 4])
    monkeypatch.setattr(sequence._native, "load_or_none", lambda kind: module)
    active = SimpleNamespace(get_current_stream=lambda index: 0)
    monkeypatch.setattr(sequence, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(sequence, "_compiled", {})
    return native_runs


def test_sequence_keeps_its_compiled_kernels_alive(native_runs: list[Any]):
    kernel = Kernel()
    call = sequence.Call(kernel, (3,), ("x", "rows", "part"), (-5, 1), {"BLOCK": 64}, {})
    found = sequence.LaunchSequence([call], ["x", "rows"], {"part": (48, torch.float32)}, 64)
    memory, workspace = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(67, dtype=torch.uint8)
    # one kernel for aligned tokens, one for others, each launched by Triton once
    for skipped, known in [(0, 1), (0, 1), (1, 2), (3, 2), (8, 2), (2, 2)]:
        found.run([memory[skipped:], None], workspace)
        assert len(kernel.compiled) == known
    for skipped in (0, 1):  # the same for an unaligned workspace
        found.run([memory[skipped:], None], workspace[4:])
        assert len(kernel.compiled) == 3 + skipped
    assert found.relauncher(memory.device) is not None
    assert found.relauncher(torch.device("cuda", 1)) is None
    gc.collect()
    assert all(reference() is not None for reference in kernel.compiled)
    given = [launch[0][-1] for launch in native_runs]
    assert [values[0] - memory.data_ptr() for values in given] == [0, 6, 16, 4]
    assert {values[1] - workspace.data_ptr() for values in given} == {48}


def test_launch_uses_the_device_of_tensors_and_current_stream(
    native_runs: list[Any], device_stack: list[Any], monkeypatch: pytest.MonkeyPatch
):
    devices: list[Any] = []

    class DeviceRecordingKernel(Kernel):
        def __getitem__(self, grid: Any) -> Any:
            devices.append(device_stack[-1])
            return super().__getitem__(grid)

    streams = iter((8, 9))
    monkeypatch.setattr(sequence.driver.active, "get_current_stream", lambda index: next(streams))
    list_type = sequence._native.load_or_none("cuda").LaunchList
    given = lambda self, spots, base, index, stream: native_runs.append((index, stream))  # noqa: E731
    monkeypatch.setattr(list_type, "run", given)
    call = sequence.Call(
        DeviceRecordingKernel(), (3,), ("x", "rows", "part"), (-5, 1), {"BLOCK": 64}, {}
    )
    found = sequence.LaunchSequence([call], ["x", "rows"], {"part": (48, torch.float32)}, 64)
    memory, workspace = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.uint8)
    for _ in range(3):
        found.run([memory, None], workspace)
    assert devices == [memory.device]
    assert native_runs == [(None, 8), (None, 9)]


def test_sequences_of_different_sizes_share_kernels(
    native_runs: list[Any], monkeypatch: pytest.MonkeyPatch
):
    kernel, memory = Kernel(), torch.zeros(64, dtype=torch.bfloat16)
    monkeypatch.setattr(sequence, "MAX_COMPILED", 2)

    def run(n: int) -> Any:
        call = sequence.Call(kernel, (3,), ("x", "rows", "part"), (n, 1), {"BLOCK": 64}, {})
        parts = {"part": (48, torch.float32)}
        found = sequence.LaunchSequence([call], ["x", "rows"], parts, 64)
        found.run([memory, None], torch.zeros(64, dtype=torch.uint8))
        return found

    kept = [run(n) for n in (-5, -7)]
    assert len(kernel.compiled) == len(native_runs) == len(sequence._compiled) == 1
    assert native_runs[0][0][-1][2] == 2**64 - 7
    del kept[0]
    run(32)
    assert len(sequence._compiled) == 2
    run(1)  # above the limit: the cache is cleared, but sequences keep their kernels
    gc.collect()
    assert len(sequence._compiled) == 1
    assert [reference() is None for reference in kernel.compiled] == [False, True, False]


def test_interpreted_kernels_are_always_launched_by_triton(native_runs: list[Any]):
    ran = []

    class Interpreted(Kernel):
        def __getitem__(self, grid: Any) -> Any:
            return lambda *given, **constants: ran.append(given)

    call = sequence.Call(Interpreted(), (3,), ("x", "rows", "part"), (-5, 1), {"BLOCK": 64}, {})
    found = sequence.LaunchSequence([call], ["x", "rows"], {"part": (48, torch.float32)}, 64)
    memory = torch.zeros(64, dtype=torch.bfloat16)
    for _ in range(2):
        found.run([memory, None], torch.zeros(64, dtype=torch.uint8))
    assert [given[0] is memory for given in ran] == [True, True]
    assert found.relauncher(memory.device) is None
    assert sequence._compiled == {}


class JitFunction:
    """The attributes of a jitted function that describe its arguments."""

    arg_names = ("x", "rows", "part", "n", "plain", "BLOCK")
    params = tuple(SimpleNamespace(name=n, do_not_specialize=n == "plain") for n in ("n", "plain"))


KERNELS = {"a": JitFunction(), "another": JitFunction()}


def key_of(**changes: Any) -> Any:
    """Return the specialisation key of one call with changed arguments."""
    given = {"n": 33, "plain": 7, "block": 64, "x": torch.bfloat16, "rows": None, "name": "a"}
    given |= {"part": (48, torch.float32), "warps": 4, "grid": (3,)} | changes
    numbers, options = (given["n"], given["plain"]), {"num_warps": given["warps"]}
    constants = {"BLOCK": given["block"], "OF_ANOTHER_KERNEL": given["grid"]}
    kernel, tensors = KERNELS[given["name"]], ("x", "rows", "part")
    call = sequence.Call(kernel, given["grid"], tensors, numbers, constants, options)
    found = sequence.LaunchSequence([call], ["x", "rows"], {"part": given["part"]}, 64)
    rows = None if given["rows"] is None else torch.zeros(2, dtype=given["rows"])
    return found._specialisation_key([torch.zeros(2, dtype=given["x"]), rows])


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 35},
        {"n": -35},
        {"plain": 1},
        {"plain": 16},
        {"grid": (4, 2)},
        {"part": (64, torch.float32)},
    ],
)
def test_changes_that_need_no_new_compiled_kernel(changes: dict[str, Any]):
    assert key_of(**changes) == key_of()


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 1},
        {"n": 32},
        {"n": 2**31 + 1},
        {"n": -(2**31) - 1},
        {"n": 2**63 + 1},
        {"plain": 2**31},
        {"block": 32},
        {"x": torch.float16},
        {"rows": torch.int64},
        {"part": (52, torch.float32)},
        {"part": (48, torch.bfloat16)},
        {"warps": 8},
        {"name": "another"},
    ],
)
def test_changes_that_need_a_new_compiled_kernel(changes: dict[str, Any]):
    assert key_of(**changes) != key_of()
    assert key_of(n=2**31 + 1) != key_of(n=2**63 + 1)
    assert hash(key_of(**changes)) == hash(key_of(**changes))


def test_missing_addresses_and_too_many_parameters_raise():
    with pytest.raises(IndexError):
        native_list([8, 8, 4]).resolve([], 0)
    most = _C.LaunchList()
    most.add(7, (1, 1, 1), 32, 0, False, [(sequence.NUMBER, i) for i in range(32)])
    assert most.resolve([], 0)[0][-1] == list(range(32))
    with pytest.raises(ValueError, match="too many parameters"):
        _C.LaunchList().add(7, (1, 1, 1), 32, 0, False, [(sequence.NUMBER, 1)] * 33)


@pytest.mark.skipif(not find_spec("eva_kernels._cuda"), reason="the CUDA module is not built")
@pytest.mark.parametrize("order", ["_C, _cuda", "_cuda, _C"])
def test_both_native_modules_load_in_one_process(order: str):
    code = f"from eva_kernels import {order}; print(_C.LaunchList(), _cuda.LaunchList().run)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.gpu
def test_native_code_launches_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    from eva_kernels.kernels.sketch import sketch_sequence
    from eva_kernels.ops import sketch

    found, choose = [], sequence.native_launches
    monkeypatch.setattr(
        sequence, "native_launches", lambda *given: found.append(choose(*given)) or found[-1]
    )
    sketch_sequence.cache_clear()
    sums = []
    for _ in range(3):
        x = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
        basis = torch.eye(32, 256, device="cuda")
        products = torch.zeros_like(basis)
        shift = torch.zeros(256, dtype=torch.float64, device="cuda")
        sketch(x, basis, shift.float(), products, shift, shift.new_zeros(()))
        sums.append(products)
    assert _native.unavailable_reason("cuda") is None
    assert len(found) == 1
    assert found[0] is not None
    assert all(torch.equal(other, sums[0]) for other in sums)


@pytest.mark.gpu
def test_launch_from_a_new_thread():
    from eva_kernels.ops import sketch

    x, basis = torch.randn(64, 32, device="cuda").bfloat16(), torch.eye(16, 32, device="cuda")
    shift, pivot = torch.zeros(32, dtype=torch.float64, device="cuda"), basis.new_zeros(32)
    found: list[torch.Tensor] = []
    given = [(torch.zeros_like(basis), shift.clone(), shift.new_zeros(())) for _ in range(2)]

    def run() -> None:
        sums = given[len(found)]
        sketch(x, basis, pivot, *sums)  # the first launch of this thread
        found.append(sums[0])

    run()  # the kernels are compiled now
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert torch.equal(*found)

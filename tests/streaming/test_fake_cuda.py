"""A step on a simulated GPU: devices, number of host reads, and peak memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from eva_kernels.errors import EvaValueError
from eva_kernels.streaming import (
    InputStream,
    Options,
    _host,
    compare_streams,
    fold_streams,
    spectra,
)
from eva_kernels.streaming import batch as batch_module
from eva_kernels.streaming._basis import random_basis
from fake_cuda import DEVICE, compiler_missing, fake_cuda
from helpers import CPU
from host_reads import HostReads

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs g++ for a device guard")
TWO_GPUS = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="fake tensors touch their GPU, if there are any"
)
GIB = 1 << 30


def on_gpu(
    features: int, components: int, method: str = "sketch", device: torch.device = DEVICE
) -> InputStream:
    options = Options(method, backend="torch")
    return InputStream(features, components, 2 * components, device, options=options)


@pytest.mark.parametrize("criterion", ["cosine", "subspace"])
def test_step_reads_once(criterion: str) -> None:
    shapes = [(96, 8, "sketch"), (64, 8, "sketch"), (96, 8, "sketch"), (32, 4, "gram")]
    with fake_cuda() as reads:
        streams = [on_gpu(*shape) for shape in shapes]
        for step in range(2):
            for stream in streams:
                x = torch.zeros(50, stream.features, dtype=torch.bfloat16, device=DEVICE)
                assert stream.add(x, torch.arange(40, device=DEVICE)) == 40
            assert len(reads) == step
            folded = fold_streams(streams)
            assert len(reads) == step + 1
            if step == 0:  # nothing to compare with, so no read
                compare_streams(folded, [2] * 4, tau=0.9, criterion=criterion)
        compare_streams(folded, [2] * 4, tau=0.9, criterion=criterion)
        assert len(reads) == (3 if criterion == "subspace" else 2)
        for stream in streams:
            assert stream.tokens == 80
            assert {t.device for t in (stream.sketch.basis, stream.sketch.mean)} == {DEVICE}
            assert stream.similarity == 0.0


@TWO_GPUS
@pytest.mark.parametrize("criterion", ["cosine", "subspace"])
def test_each_gpu_computes_its_own_cosines(criterion: str) -> None:
    def answer(
        tensor: torch.Tensor,
    ) -> np.ndarray:  # rank 0 for (Q, Q) matrices, the device index for cosines
        return np.full(tensor.shape, 0.5 * tensor.device.index if tensor.dim() == 1 else 0.0)

    devices = [torch.device("cuda", i) for i in (0, 1)]
    with fake_cuda(answer) as reads:
        streams = [on_gpu(64, 8, device=devices[i]) for i in (1, 0, 0)]
        for _ in range(2):
            for stream in streams:
                stream.add(torch.zeros(50, 64, device=stream.device))
            compare_streams(fold_streams(streams), [4] * 3, tau=0.5, criterion=criterion)
        assert len(reads) == (3 if criterion == "subspace" else 2)
        answers = spectra(streams)
        assert [a.components.device for a in answers] == [stream.device for stream in streams]
    assert [stream.similarity for stream in streams] == [0.5, 0.0, 0.0]
    assert [stream.converged for stream in streams] == [True, False, False]


@TWO_GPUS
@pytest.mark.parametrize("started", [False, True])
def test_tokens_on_another_gpu_raise(started: bool) -> None:
    with fake_cuda():
        for place in (DEVICE, torch.device("cuda")):
            stream = on_gpu(64, 8, device=place)
            if started:
                stream.add(torch.zeros(50, 64, device=DEVICE))
            for other in (torch.device("cuda", 1), CPU):
                if not started and place.index is None and other.type == "cuda":
                    continue  # only one batch is needed to start
                with pytest.raises(EvaValueError, match=f"expected tokens on cuda.*, got {other}"):
                    stream.add(torch.zeros(50, 64, device=other))


def test_peak_memory_of_a_llama_2_7b_step() -> None:
    with fake_cuda():
        streams = [on_gpu(d, 32) for d in [4096, 4096, 4096, 11008] * 32]
        tracker = MemTracker()
        with tracker:
            for _ in range(2):  # only the second step has a previous one to compare with
                for stream in streams:
                    stream.add(torch.zeros(64, stream.features, device=DEVICE))
                held = tracker.get_tracker_snapshot("current")[DEVICE]["Total"]
                compare_streams(fold_streams(streams), [1] * 128, tau=0.9)
        peak = tracker.get_tracker_snapshot("peak")[DEVICE]["Total"]
        kept = tracker.get_tracker_snapshot("current")[DEVICE]["Total"]
    assert held == kept == pytest.approx(sum(s.nbytes for s in streams), rel=0.01)
    assert 0.3 * GIB < held < 0.4 * GIB
    # The previous rows, half of each basis, are a quarter of this; three chunks are the rest.
    assert peak - held < 0.2 * GIB


def test_spectra_of_llama_2_7b_are_copied_in_chunks() -> None:
    with fake_cuda():
        streams = [on_gpu(d, 32) for d in [4096, 4096, 4096, 11008] * 32]
        for stream in streams:
            stream.add(torch.zeros(64, stream.features, device=DEVICE))
        fold_streams(streams)
        tracker, counts = MemTracker(), HostReads()
        with tracker, counts:
            answers = spectra(streams, CPU)
        peak = tracker.get_tracker_snapshot("peak")[DEVICE]["Total"]
    assert {(a.components.device, a.mean.device) for a in answers} == {(CPU, CPU)}
    assert [a.components.shape for a in answers] == [(32, s.features) for s in streams]
    # 16 layers of 4096 or 5 of 11008 are a chunk: 6 + 7 chunks, each of which launches a dozen
    # operators and is two copies, of components and of means.
    assert counts.calls["_to_copy"] == 13 * 2
    del counts.calls["prim::device"]  # called only for tensors without contents
    assert counts.calls.total() < 13 * 20
    assert 0 < peak <= batch_module.CHUNK_BYTES_ACCELERATOR


def test_simulation_leaves_no_fake_tensor() -> None:
    with fake_cuda():
        random_basis(2, 5, 0)
    assert type(random_basis(2, 5, 0)) is torch.Tensor
    assert _host.read([torch.ones(2)])[0].tolist() == [1.0, 1.0]

"""Compile every entry of the launch tables for its architecture; no GPU is needed.

Shows what the tables rest on: tensor-core instructions, registers, spills, shared memory, and the
time that bytes and flops allow on an H200. A child process compiles, since a process in which
Triton interprets kernels cannot.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import ROOT

if TYPE_CHECKING:
    from eva_kernels.kernels.sequence import Call, LaunchSequence

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
WIDTHS = (64, 128, 256)
TENSOR_CORE = {
    "wgmma": r"wgmma\.mma_async",
    "mma.sync": r"(?<![.\w])mma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma_",
}
# NVIDIA H200 SXM, data sheet: dense bfloat16, memory. The L2 rate is that of project and back on
# one: 75 MB more of X took 47 us more, and so much was read again of V and P.
H200 = {"flops": 989e12, "memory": 4.8e12, "l2": 6.4e12, "launch": 2e-6}
SHAPES = ((2048, 4096), (8192, 4096), (2048, 11008), (8192, 11008))


# Bytes that a release of Triton spills whatever the tile, in project: 3.8 does, 3.6 and 3.9 do not.
KNOWN_SPILL_BYTES = {("3.8", "sm_80"): 24}


def can_compile() -> bool:
    """Tell whether Triton takes constants and alignment in the way of 3.3 and later."""
    from triton.compiler import ASTSource

    return "constexprs" in inspect.signature(ASTSource).parameters


def compile_all(archs: tuple[str, ...] = ARCHS) -> list[dict[str, Any]]:
    """Return one record per compiled kernel, from one child process per architecture."""
    if not can_compile():
        raise RuntimeError("compiling the kernels without a GPU needs Triton 3.3 or later")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def child(arch: str) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, "-m", "bench.kernel_report", arch],
                env=environment | {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"},
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
        if done.returncode:
            raise RuntimeError(f"compiling for {arch} failed:\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        return [record for records in pool.map(child, archs) for record in records]


def launch_sequences(arch: str) -> Iterator[tuple[str, str, LaunchSequence]]:
    """Yield (suffix of the names, tokens, sequence) of everything that is launched.

    In split precision, the code with the most in it: tokens with row indices whose last tile is
    cut; and bfloat16 tokens without indices in whole tiles, which is what most batches are.
    """
    import torch

    from eva_kernels.kernels import gram, sketch
    from eva_kernels.kernels.launch import ARCHS as LAUNCH_ARCHS

    # The tile for float16 is that for float32, with smaller operands.
    for tokens, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        for q in WIDTHS:
            sequence = sketch.sketch_sequence(
                8191, q, 4096, 4096, dtype, True, True, LAUNCH_ARCHS[arch]
            )
            yield f" Q={q}", tokens, sequence
            if tokens == "bf16":
                unmasked = sketch.sketch_sequence(
                    8192, q, 4096, 4096, dtype, False, True, LAUNCH_ARCHS[arch]
                )
                yield f" Q={q} all rows", tokens, unmasked
        for d in (512, 4096):  # the splits of narrow tokens are added by another kernel
            sequence = gram.gram_sequence(8191, d, d, dtype, True, True, LAUNCH_ARCHS[arch])
            yield f" gram D={d}", tokens, sequence


def compile_for(arch: str) -> list[dict[str, Any]]:
    """Compile what is launched on an architecture, in this process."""
    from triton.backends.compiler import GPUTarget

    from eva_kernels.kernels.launch import ARCHS as LAUNCH_ARCHS

    target = GPUTarget("cuda", int(arch[3:]), 32) if arch[:3] == "sm_" else None
    target = target or GPUTarget("hip", arch, 64)
    records = []
    for suffix, tokens, sequence in launch_sequences(arch):
        for call in sequence.calls:
            tile = [call.constants.get(name) for name in ("BLOCK_N", "BLOCK_D")]
            streams = "num_stages" in call.options
            code = _compile(call, sequence, tokens, target)
            records.append(
                {
                    "arch": arch,
                    "kernel": call.kernel.__name__ + suffix,
                    "tokens": tokens,
                    "tile": tile if streams else None,
                    **{k: v for k, v in call.options.items() if k.startswith("num_")},
                    **_resources(code),
                    "shared_limit": LAUNCH_ARCHS[arch].shared_bytes,
                }
            )
    return records


def _compile(call: Call, sequence: LaunchSequence, tokens: str, target: Any) -> Any:
    """Compile as a launch on aligned tensors would."""
    import triton
    from triton.compiler import ASTSource

    types = {"x": f"*{tokens}", "rows": "*i64", "shift": "*fp64", "square": "*fp64"}
    names = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32"}
    parts = {
        k: names[str(dtype).removeprefix("torch.")] for k, (_, dtype) in sequence.parts.items()
    }
    types = dict.fromkeys(sequence.tensor_names, "*fp32") | types | parts
    values = [types[name] for name in call.pointers] + ["i32"] * len(call.numbers)
    constants = call.kernel_constants
    signature = dict(zip(call.kernel.arg_names, values, strict=False))
    signature |= dict.fromkeys(constants, "constexpr")
    num_pointers = len(call.pointers)
    aligned_numbers = [
        i
        for i, number in enumerate(call.numbers, num_pointers)
        if number % 16 == 0 and not call.kernel.params[i].do_not_specialize
    ]
    aligned = {(i,): [["tt.divisibility", 16]] for i in [*range(num_pointers), *aligned_numbers]}
    source = ASTSource(call.kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=dict(call.options))


def _resources(code: Any) -> dict[str, Any]:
    """Return registers, spills, shared memory and tensor-core instructions of compiled code."""
    text = code.asm.get("ptx") or code.asm["amdgcn"]
    instructions = {name: len(re.findall(pattern, text)) for name, pattern in TENSOR_CORE.items()}
    record = {
        "shared": code.metadata.shared,
        "tensor_core": {k: v for k, v in instructions.items() if v},
        "in_flight": count_products_in_flight(code.asm["ttgir"]),
        "exchanged": count_layout_exchanges(code.asm["ttgir"]),
        "early": accesses_memory_early(text),
    }
    if "amdgcn" in code.asm:
        spilled = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s+(\d+)", text)
        return record | {
            "registers": int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0]),
            "stack": sum(map(int, spilled)),
        }
    return record | _usage(code.asm["cubin"])


def count_products_in_flight(ttgir: str) -> int:
    """Count the rounds of loops that end while a product of the tensor cores still reads a tile.

    The copy of a later tile may overtake it, see ``add_product``.
    """
    count, in_flight = 0, False
    for line in ttgir.splitlines():
        if "warp_group_dot " in line and "isAsync = true" in line:
            in_flight = True
        elif "warp_group_dot_wait" in line and "pendings = 0" in line:
            in_flight = False
        elif "scf.yield" in line:
            count, in_flight = count + in_flight, False
    return count


def count_layout_exchanges(ttgir: str) -> int:
    """Count the products whose rows move to other threads before the next product adds to them.

    Through shared memory, in every round; and some were multiplied twice, see ``warps_share_rows``.
    """
    return len(re.findall(r"ttg\.convert_layout .*, #mma\d*> -> tensor<\w+, #mma\d*>", ttgir))


def accesses_memory_early(ptx: str) -> bool:
    """Tell whether memory is accessed before the wait for the preceding kernel."""
    touched = re.search(r"\b(?:ld|st|red|atom)\.global|cp\.async|cp\.reduce", ptx)
    wait = ptx.find("griddepcontrol.wait")
    return "griddepcontrol" in ptx and touched is not None and not 0 <= wait < touched.start()


def _usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "stack": int(found[2])}


def predictions() -> list[dict[str, Any]]:
    """Return what bytes and flops allow a sketch on an H200, by shape and width."""
    from eva_kernels.kernels.launch import ARCHS as LAUNCH_ARCHS
    from eva_kernels.kernels.sketch_plan import plan_sketch

    rows = []
    for n, d in SHAPES:
        for q in WIDTHS:
            plan = plan_sketch(n, q, d, False, LAUNCH_ARCHS["sm_90"])
            flops = 2 * 4 * n * d * plan.block_q
            x_bytes = 2 * n * d
            bytes_per_column = 4 * plan.block_q
            v_reread_bytes = -(-n // plan.project.block_n) * bytes_per_column * d
            p_reread_bytes = -(-d // plan.back.block_d) * bytes_per_column * plan.pitch
            partial_bytes = 8 * plan.block_q * (plan.splits_d * plan.pitch + plan.splits_n * d)
            l2_bytes = 2 * x_bytes + v_reread_bytes + p_reread_bytes + partial_bytes
            terms = {
                "tensor cores": flops / H200["flops"],
                "memory": x_bytes / H200["memory"],
                "L2": l2_bytes / H200["l2"],
            }
            rows.append(
                {
                    "N": n, "D": d, "Q": q, "splits": [plan.splits_d, plan.splits_n],
                    "flops": flops, "bytes": x_bytes, "l2_bytes": l2_bytes,
                    "microseconds": {k: round(v * 1e6, 1) for k, v in terms.items()},
                    "predicted_us": round((max(terms.values()) + 5 * H200["launch"]) * 1e6, 1),
                    "workspace_mib": round(plan.nbytes / 2**20, 1),
                }
            )  # fmt: skip
    return rows


def faults(records: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong with compiled kernels, one line each."""
    import triton

    faults, release = [], ".".join(triton.__version__.split(".")[:2])
    for record in records:
        name = f"{record['arch']} {record['kernel']} {record['tokens']} tile {record['tile']}"
        if record["stack"] > KNOWN_SPILL_BYTES.get((release, record["arch"]), 0):
            faults.append(f"{name}: {record['stack']} bytes of stack or spills")
        if record["shared"] > record["shared_limit"]:
            faults.append(f"{name}: {record['shared']} bytes of shared memory")
        if record["in_flight"]:
            faults.append(
                f"{name}: a loop iteration ends while a tensor-core product still reads its tile"
            )
        if record["early"]:
            faults.append(f"{name}: memory is accessed before the wait for the preceding kernel")
        if record["exchanged"]:
            faults.append(f"{name}: an accumulator moves to other threads between two products")
        streams = any(k in record["kernel"] for k in ("project", "back", "gram_kernel"))
        if streams and not record["tensor_core"]:
            faults.append(f"{name}: no tensor-core instruction")
    return faults


def run(archs: tuple[str, ...], write: bool) -> list[str]:
    """Print the tables, write them to a result file if asked, and return the faults."""
    from rich.console import Console
    from rich.table import Table

    from .common import save

    records, predicted = compile_all(archs), predictions()
    console = Console()
    table = Table(title="Compiled kernels")
    for column in ("arch", "kernel", "tokens", "tile", "warps", "stages", "registers", "stack"):
        table.add_column(column)
    table.add_column("shared KiB")
    table.add_column("tensor core")
    for r in records:
        used = " ".join(f"{name} {count}" for name, count in r["tensor_core"].items())
        stages = str(r.get("num_stages", ""))
        cells = (r["num_warps"], stages, r["registers"], r["stack"], f"{r['shared'] / 1024:.0f}")
        tile = "" if r["tile"] is None else "x".join(map(str, r["tile"]))
        table.add_row(r["arch"], r["kernel"], r["tokens"], tile, *map(str, cells), used)
    console.print(table)
    table = Table(title="Sketch of bfloat16 tokens on an H200, predicted from bytes and flops")
    for column in ("N", "D", "Q", "tensor cores us", "memory us", "L2 us", "with launches us"):
        table.add_column(column, justify="right")
    for r in predicted:
        cells = (r["N"], r["D"], r["Q"], *r["microseconds"].values(), r["predicted_us"])
        table.add_row(*map(str, cells))
    console.print(table)
    found_faults = faults(records)
    console.print(
        "\n".join(found_faults) or f"{len(records)} kernels: no spills, within shared memory"
    )
    if write:
        save("kernel_report", records, predicted=predicted, triton=version("triton"))
    return found_faults


if __name__ == "__main__":
    print(json.dumps(compile_for(sys.argv[1])))

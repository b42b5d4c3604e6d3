"""Compile every entry of the launch tables for its architecture; no GPU is needed.

Shows what the tables rest on: tensor-core instructions, registers, spills, shared memory, and the
time that bytes and flops allow on an H200. A child process compiles, since a process in which
Triton interprets kernels cannot.
"""

from __future__ import annotations

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
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
WIDTHS = (64, 128, 256)
# Tokens that take a tile of their own; float16 uses the one of float32 with smaller operands.
TOKENS = {"bf16": 2, "fp32": 4}
TENSOR_CORE = {
    "wgmma": r"wgmma\.mma_async",
    "mma.sync": r"(?<![.\w])mma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma_",
}
# NVIDIA H200 SXM, data sheet: dense bfloat16, memory; the L2 rate is what H100s have been seen to
# read at, and only an estimate.
H200 = {"flops": 989e12, "memory": 4.8e12, "l2": 5.5e12, "launch": 2e-6}
SHAPES = ((2048, 4096), (8192, 4096), (2048, 11008), (8192, 11008))


def compile_all(archs: tuple[str, ...] = ARCHS, processes: int = 2) -> list[dict[str, Any]]:
    """Return one record a compiled kernel, from child processes, one an architecture."""
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

    with ThreadPoolExecutor(processes) as pool:
        return [record for records in pool.map(child, archs) for record in records]


def kernels(arch: str) -> Iterator[tuple[Any, dict[str, Any], Any, str, str]]:
    """Yield (kernel, constants, tile or None, tokens, name) of everything that is launched."""
    from eva_kernels.kernels import gram, sketch
    from eva_kernels.kernels.launch import GRAM_TILES, SKETCH_TILES, rows_of_a_thread

    # Row indices and split precision: the code with the most in it.
    full = {"HAS_ROWS": True, "HIGH": True}
    for width in WIDTHS:
        shared = {**full, "BLOCK_Q": width}
        block_n = sketch.finish_tokens(width)
        small = {"FLAGS": 1, "BLOCK_N": block_n, "BLOCK_D": 64, "CENTRED": False}
        for kernel in (sketch.prepare_kernel, sketch.finish_kernel):
            yield kernel, shared | small, None, "bf16", f"{kernel.__name__} Q={width}"
        for tokens, itemsize in TOKENS.items():
            centred = tokens != "bf16"
            project, back = SKETCH_TILES[arch][width].of(centred)
            for kernel, tile in ((sketch.project_kernel, project), (sketch.back_kernel, back)):
                constants = shared | {
                    "CENTRED": centred,
                    "FLAGS": 256 if kernel is sketch.project_kernel else tile.block_d // 64,
                    "FOLD": rows_of_a_thread(tile, itemsize),
                }
                yield kernel, constants, tile, tokens, f"{kernel.__name__} Q={width}"
            constants = shared | {"CENTRED": centred, "FLAGS": back.block_d // 64, "BLOCK_D": 64}
            yield sketch.collect_kernel, constants, None, tokens, f"collect_kernel Q={width}"
    for tokens, itemsize in TOKENS.items():
        tile = GRAM_TILES[arch].of(itemsize)
        for direct in (True, False):
            constants = full | {"DIRECT": direct, "FOLD": rows_of_a_thread(tile, itemsize)}
            yield gram.gram_kernel, constants, tile, tokens, f"gram_kernel direct={direct}"
            constants = {"DIRECT": direct, "BLOCK_D": tile.block_d}
            yield gram.collect_kernel, constants, None, tokens, f"gram collect direct={direct}"


def compile_for(arch: str) -> list[dict[str, Any]]:
    """Compile what is launched on an architecture, in this process."""
    from triton.backends.compiler import GPUTarget

    from eva_kernels.kernels.launch import ARCHS as LIMITS
    from eva_kernels.kernels.launch import stages
    from eva_kernels.kernels.sketch import small_warps

    target = GPUTarget("cuda", int(arch[3:]), 32) if arch[:3] == "sm_" else None
    target = target or GPUTarget("hip", arch, 64)
    records = []
    for kernel, constants, tile, tokens, name in kernels(arch):
        options: dict[str, Any] = {"num_warps": 4}
        if tile is not None:
            constants = {"BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d} | constants
            indirect = "project" not in name  # there the addresses are loaded before the loop
            depth = stages(tile, indirect, LIMITS[arch])
            options = {"num_warps": tile.num_warps, "num_stages": depth}
        elif name.startswith("gram"):
            options["num_warps"] = 8 if constants["BLOCK_D"] == 128 else 4
        elif "finish" not in name:
            options["num_warps"] = small_warps(constants["BLOCK_Q"])
        code = _compile(kernel, constants, tokens, target, options)
        records.append(
            {
                "arch": arch,
                "kernel": name,
                "tokens": tokens,
                "tile": None if tile is None else [tile.block_n, tile.block_d],
                **options,
                **_resources(code),
                "shared_limit": LIMITS[arch].shared_bytes,
            }
        )
    return records


def _compile(kernel: Any, constants: dict[str, Any], tokens: str, target: Any, options: Any) -> Any:
    import triton
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    types = {"x_ptr": f"*{tokens}", "rows_ptr": "*i64", "flags_ptr": "*i32", "stride_xn": "i64"}
    types |= {"high_ptr": "*bf16", "low_ptr": "*bf16"}
    if kernel.__name__ == "collect_kernel":
        types |= {"shift_ptr": "*fp64", "square_ptr": "*fp64"}
    constants = {name: value for name, value in constants.items() if name in names}
    signature, aligned = {}, {}
    for i, name in enumerate(names):
        default = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
        # As at a launch with D a multiple of 16: without it nothing is loaded 16 bytes at a time.
        if name.endswith("_ptr") or name in ("d", "pitch", "stride_xn"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def _resources(code: Any) -> dict[str, Any]:
    """Return registers, spills, shared memory and tensor-core instructions of compiled code."""
    text = code.asm.get("ptx") or code.asm["amdgcn"]
    found = {name: len(re.findall(pattern, text)) for name, pattern in TENSOR_CORE.items()}
    record = {
        "shared": code.metadata.shared,
        "tensor_core": {k: v for k, v in found.items() if v},
        "in_flight": in_flight(code.asm["ttgir"]),
    }
    if "amdgcn" in code.asm:
        spilled = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s+(\d+)", text)
        return record | {
            "registers": int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0]),
            "stack": sum(map(int, spilled)),
        }
    return record | _usage(code.asm["cubin"])


def in_flight(ttgir: str) -> int:
    """Count the rounds of loops that end while a product of the tensor cores still reads a tile.

    The copy of a later tile may overtake it, see ``add_product``.
    """
    found, reading = 0, False
    for line in ttgir.splitlines():
        if "warp_group_dot " in line and "isAsync = true" in line:
            reading = True
        elif "warp_group_dot_wait" in line and "pendings = 0" in line:
            reading = False
        elif "scf.yield" in line:
            found, reading = found + reading, False
    return found


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
    from eva_kernels.kernels.launch import ARCHS as KNOWN
    from eva_kernels.kernels.sketch import plan_sketch

    rows = []
    for n, d in SHAPES:
        for q in WIDTHS:
            plan = plan_sketch(n, q, d, False, KNOWN["sm_90"])
            flops = 2 * 4 * n * d * plan.block_q
            x_bytes = 2 * n * d
            planes = 4 * plan.block_q
            again_v = -(-n // plan.project.block_n) * planes * d
            again_p = -(-d // plan.back.block_d) * planes * plan.pitch
            partial = 8 * plan.block_q * (plan.splits_d * plan.pitch + plan.splits_n * d)
            l2_bytes = 2 * x_bytes + again_v + again_p + partial
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
    found = []
    for record in records:
        name = f"{record['arch']} {record['kernel']} {record['tokens']} tile {record['tile']}"
        if record["stack"]:
            found.append(f"{name}: {record['stack']} bytes of stack or spills")
        if record["shared"] > record["shared_limit"]:
            found.append(f"{name}: {record['shared']} bytes of shared memory")
        if record["in_flight"]:
            found.append(f"{name}: a product is in flight at the end of a round of its loop")
        streams = any(k in record["kernel"] for k in ("project", "back", "gram_kernel"))
        if streams and not record["tensor_core"]:
            found.append(f"{name}: no tensor-core instruction")
    return found


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
    wrong = faults(records)
    console.print("\n".join(wrong) or f"{len(records)} kernels: no spills, within shared memory")
    if write:
        save("kernel_report", records, predicted=predicted, triton=version("triton"))
    return wrong


if __name__ == "__main__":
    print(json.dumps(compile_for(sys.argv[1])))

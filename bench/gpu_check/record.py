"""The result file: written atomically after every stage, and read again by ``--resume``."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..files import ROOT, commit

SCHEMA_VERSION = 1
FILE = "gpu-check.json"
SOURCES = ("eva_kernels", "python", "csrc", "bench", "tests", "setup.py", "pyproject.toml")
SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h", ".toml"}


def source_hash(root: Path = ROOT) -> str:
    """Return a digest of all sources, which identifies what was checked without a commit."""
    digest = hashlib.sha256()
    for name in SOURCES:
        top = root / name
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in files:
            if path.suffix in SUFFIXES and path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + b"\0")
                digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def new_record(dry_run: bool, gpu: str | None = None) -> dict[str, Any]:
    """Return a record without stages.

    Args:
        dry_run: whether it is a rehearsal.
        gpu: name of the GPU, if known.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "sources": source_hash(),
        "dry_run": dry_run,
        "status": "running",
        "seconds": 0.0,
        "machine": {} if gpu is None else {"name": gpu},
        "versions": {},
        "stages": {},
    }


def resumable_parts(
    earlier: Any, record: dict[str, Any], skip: Collection[str] = ()
) -> dict[str, Any]:
    """Return the parts of an earlier record to keep: passed stages, and the machine they ran on.

    Nothing is kept unless schema, sources, ``dry_run`` and GPU are the same.

    Args:
        earlier: as read.
        record: the new one.
        skip: stages that are kept whatever their outcome.
    """
    keys = ("schema_version", "sources", "dry_run")
    if not isinstance(earlier, Mapping) or any(earlier.get(k) != record[k] for k in keys):
        return {}
    if earlier.get("machine", {}).get("name") != record["machine"].get("name"):
        return {}
    kept_stages = {
        name: {**stage, "kept": True}
        for name, stage in earlier.get("stages", {}).items()
        if stage.get("status") == "passed" or name in skip
    }
    return {"stages": kept_stages, **{key: earlier.get(key, {}) for key in ("machine", "versions")}}


def verdict(stages: Mapping[str, Mapping[str, Any]], required: Mapping[str, bool]) -> str:
    """Return ``"passed"`` if all required stages did and no other failed, else ``"failed"``.

    Args:
        stages: name -> outcome, with its ``status``.
        required: name -> whether the stage may not be skipped, for every stage of the plan.
    """
    for name, is_required in required.items():
        status = stages.get(name, {}).get("status", "not reached")
        if status != "passed" and (is_required or status != "skipped"):
            return "failed"
    return "passed"

"""A checkpoint as one safetensors file that is replaced as a whole and refused if damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import EvaValueError
from ..surroundings.files import atomic_write, scratch_folder_beside, scratch_folders_beside

__all__ = [
    "FORMAT",
    "REMEDY",
    "check_path",
    "checksum",
    "read_checkpoint",
    "read_file",
    "write_checkpoint",
    "write_file",
]

FORMAT = "eva_kernels.checkpoint/1"
REMEDY = "delete the file to start from the beginning, or pass another path as checkpoint"
# A header is limited to 100 MB, tensor names included, and quotes take two bytes there.
MAX_HEADER_TEXT = 32 << 20
_TEXT_PREFIX = "text."


def write_checkpoint(path: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a state and its tensors, so that the path holds the old file or the new one.

    Raises:
        OSError: or ``SafetensorError``; the old file is as it was.
    """
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, FORMAT, {"state": json.dumps(state)}, cpu_tensors)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_checkpoint` wrote.

    Raises:
        EvaValueError: damaged, another kind of file, or another version of the format.
    """
    try:
        metadata, tensors = read_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise EvaValueError(
            f"the checkpoint {path} is not a readable safetensors file ({error}): it is damaged, "
            f"cut short, or another kind of file; {REMEDY}"
        ) from error
    file_format = metadata.get("format", "not given")
    if file_format != FORMAT:
        is_other_version = file_format.startswith(FORMAT.rpartition("/")[0] + "/")
        reason = (
            "another version wrote it" if is_other_version else "it is not a checkpoint of a pass"
        )
        raise EvaValueError(
            f"the checkpoint {path} has the format {file_format}, expected {FORMAT}: {reason}; "
            f"{REMEDY}"
        )
    text = metadata.get("state", "")
    if metadata.get("checksum") != checksum(text, tensors):
        raise EvaValueError(
            f"the checkpoint {path} is damaged: its contents do not match its checksum; {REMEDY}"
        )
    state: dict[str, Any] = json.loads(text)
    return state, tensors


def write_file(
    path: Path, file_format: str, texts: Mapping[str, str], tensors: dict[str, Tensor]
) -> None:
    """Write texts and tensors, with a checksum, so that the path holds the old file or the new one.

    Args:
        path: its folder exists.
        file_format: name and version of the format.
        texts: by name.
        tensors: on the CPU, contiguous; texts that are too long for the header are added.

    Raises:
        OSError: or ``SafetensorError``; the old file is as it was.
    """
    metadata = {"format": file_format, "checksum": checksum("\n".join(texts.values()), tensors)}
    if sum(map(len, texts.values())) <= MAX_HEADER_TEXT:
        metadata |= texts
    else:  # as after many steps with many experts
        for name, text in texts.items():
            content = bytearray(text.encode())
            tensors[_TEXT_PREFIX + name] = torch.frombuffer(content, dtype=torch.uint8)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_file(path: str | PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata, with the texts, and the tensors that :func:`write_file` wrote.

    Raises:
        OSError: or ``SafetensorError`` or ValueError; it is not a file of this kind.
    """
    with safe_open(str(path), framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name in [name for name in tensors if name.startswith(_TEXT_PREFIX)]:
        content = tensors.pop(name).numpy().tobytes()
        metadata[name.removeprefix(_TEXT_PREFIX)] = content.decode()
    return metadata, tensors


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of a text, and of the names, types, shapes and bytes of tensors on the CPU."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def check_path(path: Path) -> None:
    """Create the folder, check that it is writable, and remove what killed runs left.

    Raises:
        EvaValueError: it is not writable, or the path is a folder.
    """
    try:
        if path.is_dir():
            raise EvaValueError(f"checkpoint={str(path)!r} is a folder; give the path of a file")
        target = Path(os.path.realpath(path))  # a link is followed
        target.parent.mkdir(parents=True, exist_ok=True)
        # a live writer of a leftover warns, and makes another
        for leftover in scratch_folders_beside(target):
            shutil.rmtree(leftover, ignore_errors=True)
        with scratch_folder_beside(target) as folder:
            (folder / target.name).touch()
    except OSError as error:
        raise EvaValueError(
            f"checkpoint={str(path)!r} cannot be written ({error}); give a path in a folder that "
            "can be written"
        ) from error

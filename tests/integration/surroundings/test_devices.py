"""Copies to a device: asynchronous only where the host may go on to overwrite the tensor."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from eva_peft.surroundings.devices import copy_to_device


@pytest.mark.parametrize(
    ("source", "pinned", "target", "asynchronous"),
    [
        ("cpu", False, "cuda", True),
        ("cpu", True, "cuda", False),
        ("cpu", False, "mps", False),
        ("cuda", False, "cuda:1", True),
        ("cuda", False, "cpu", False),
    ],
)
def test_copy_waits_where_memory_is_read_later(
    source: str, pinned: bool, target: str, asynchronous: bool
) -> None:
    tensor = mock.Mock(device=torch.device(source))
    tensor.is_pinned.return_value = pinned
    copy_to_device(torch.device(target), tensor)
    (call,) = tensor.to.call_args_list
    assert call.args == (torch.device(target),)
    assert call.kwargs.get("non_blocking", False) == asynchronous

"""Layouts whose arguments are on the device read nothing back: with fake CUDA tensors a read of values is an error."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from saccade.attention import patterns

_svg = importlib.import_module("saccade.attention.patterns.svg")

CALLS = {
    "packed": lambda: patterns.packed(offsets(), 300, causal=True),
    "packed keys": lambda: patterns.packed(offsets(), 300, cu_seqlens_k=offsets(), k_len=200, block=128),
    "media_time": lambda: patterns.media_time(torch.zeros(2, 150, dtype=torch.bool, device="cuda"), 3, 64),
    "svg": lambda: patterns.svg(*qkv(), (6, 4, 5), prefix=5, sink=True),
    "svg_errors": lambda: patterns.svg_errors(*qkv(), (6, 4, 5), prefix=5),
}


def offsets():
    return torch.zeros(4, dtype=torch.int32, device="cuda")


def qkv():
    return [torch.zeros(2, heads, 125, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read(name, monkeypatch):
    mode = FakeTensorMode()
    built = _svg._built  # what does not depend on the device's values is made once, and kept

    def on_device(*key):
        with _disable_current_modes():
            near, far, *tables = built(*key[:-1], torch.device("cpu"))
        move = lambda x: mode.from_tensor(x).to("cuda")  # noqa: E731
        return near._map(move), far._map(move), *map(move, tables)

    monkeypatch.setattr(_svg, "_built", on_device)
    with mode:
        out = CALLS[name]()
    assert out.device.type == "cuda"


def test_a_read_would_be_seen():
    with FakeTensorMode(), pytest.raises(Exception, match="nonzero|dynamic|data"):
        patterns.packed(offsets(), 300).full.counts.nonzero()

"""The ctypes mirrors have the layout that the compiler gives kernels/attention_args.h."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

from emulation import attention_structs
from emulation.cuda_emulator import KERNELS

STRUCTS = [
    s for s in vars(attention_structs).values() if isinstance(s, type) and s.__module__ == attention_structs.__name__
]


def test_sizes_and_offsets(tmp_path: Path) -> None:
    assert len(STRUCTS) == 8
    facts = []
    for struct in STRUCTS:
        name = f"saccade::{struct.__name__}"
        facts.append(f"sizeof({name}) == {ctypes.sizeof(struct)}")
        for field, *_ in struct._fields_:
            facts.append(f"offsetof({name}, {field}) == {getattr(struct, field).offset}")
    source = tmp_path / "layout.cpp"
    lines = [f'static_assert({fact}, "{fact}");' for fact in facts]
    source.write_text("\n".join(["#include <cstddef>", f'#include "{KERNELS}/attention_args.h"', *lines]))
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-Wno-invalid-offsetof", "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

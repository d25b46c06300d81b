"""The ctypes mirrors have the layout that the compiler gives the structs of kernels/*_args.h."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from emulation import attention_structs, axial_structs, block_structs, merge_structs
from emulation.cuda_emulator import KERNELS


@pytest.mark.parametrize(
    ("module", "header", "count"),
    [
        (merge_structs, "merge_args.h", 11),
        (attention_structs, "attention_args.h", 8),
        (axial_structs, "axial_args.h", 3),
        (block_structs, "block_args.h", 3),
    ],
)
def test_sizes_and_offsets(module: ModuleType, header: str, count: int, tmp_path: Path) -> None:
    structs = [s for s in vars(module).values() if isinstance(s, type) and s.__module__ == module.__name__]
    assert len(structs) == count
    facts = []
    for struct in structs:
        name = f"saccade::{struct.__name__}"
        facts.append(f"sizeof({name}) == {ctypes.sizeof(struct)}")
        for field, *_ in struct._fields_:
            facts.append(f"offsetof({name}, {field}) == {getattr(struct, field).offset}")
    source = tmp_path / "layout.cpp"
    lines = [f'static_assert({fact}, "{fact}");' for fact in facts]
    source.write_text("\n".join(["#include <cstddef>", f'#include "{KERNELS}/{header}"', *lines]))
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-Wno-invalid-offsetof", "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

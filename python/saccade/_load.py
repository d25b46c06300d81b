"""Loads the compiled library, or registers the same op schemas in Python where it is absent."""

from __future__ import annotations

import ctypes
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_MINIMUM_TORCH = (2, 10)


_KEPT: list[torch.library.Library] = []  # a registration lives as long as its Library object


@dataclass(frozen=True)
class Binary:
    """What is known of the compiled library: `problem` is None when it is loaded and usable."""

    problem: str | None
    info: dict[str, str] = field(default_factory=dict)

    @property
    def architectures(self) -> tuple[str, ...]:
        """CUDA architectures it holds machine code for, such as ("80", "89", "90a"); empty without CUDA."""
        return tuple(a for a in self.info.get("cuda_architectures", "").split(",") if a)


def schemas() -> dict[str, str]:
    """Op name to schema, read from the one table that the C++ side includes too."""
    table = re.findall(r'^OP\("(.+)"\)$', (_HERE / "_schemas.inc").read_text(), re.MULTILINE)
    return {schema.partition("(")[0]: schema for schema in table}


def _torch_version() -> tuple[int, int]:
    major, minor = re.match(r"(\d+)\.(\d+)", torch.__version__).groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def _open(path: Path) -> Binary:
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
        library.saccade_build_info.restype = ctypes.c_char_p
        info = json.loads(library.saccade_build_info().decode())
    except (OSError, AttributeError, ValueError) as error:
        return Binary(
            f"{path.name} could not be loaded into torch {torch.__version__} ({str(error).splitlines()[0]}): "
            "rebuild it with `pip install --force-reinstall --no-deps .` in this environment"
        )
    changed = [name for name, schema in schemas().items() if not _registered_as(name, schema)]
    if changed:
        return Binary(
            f"{path.name} was built from another version of Saccade (ops missing or changed: {', '.join(changed)}): "
            "rebuild it with `pip install --force-reinstall --no-deps .`",
            info,
        )
    return Binary(None, info)


def _registered_as(name: str, schema: str) -> bool:
    if not hasattr(torch.ops.saccade, name):
        return False
    registered = str(getattr(torch.ops.saccade, name).default._schema)
    return registered.removeprefix("saccade::").replace(" ", "") == schema.replace(" ", "")


def _define_in_python() -> torch.library.Library:
    library = torch.library.Library("saccade", "FRAGMENT")
    for name, schema in schemas().items():
        if not hasattr(torch.ops.saccade, name):
            library.define(schema)
    return library


def load() -> Binary:
    """Load `_C.so` beside this file; every op name exists in `torch.ops.saccade` afterwards, whatever happened."""
    if _torch_version() < _MINIMUM_TORCH:
        raise ImportError(f"saccade needs torch >= 2.10, found {torch.__version__}: pip install -U torch")
    path = _HERE / "_C.so"
    if path.exists():
        binary = _open(path)
    else:
        note = _HERE / "_no_binary.txt"
        why = note.read_text().strip() if note.exists() else "it has not been built"
        binary = Binary(f"no compiled library: {why}")
    if binary.problem:
        _KEPT.append(_define_in_python())
    return binary


BINARY = load()

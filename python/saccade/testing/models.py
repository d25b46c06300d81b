"""Whole models: a second one over the same weights, and everything that a swap must leave as it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["same_state", "state_of", "twin"]


def twin(model: nn.Module) -> nn.Module:
    """A second model over the same weights."""
    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, and what its dicts hold: the objects themselves."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = value
            if isinstance(value, dict):
                found |= {f"{path}.{name}[{key!r}]": entry for key, entry in value.items()}
    return found


def same_state(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two of `state_of` hold the same objects under the same names, in the same order."""
    plain = (int, float, str, bool)
    return list(before) == list(after) and all(
        a is b or (type(a) is type(b) and isinstance(a, plain) and a == b)
        for a, b in zip(before.values(), after.values(), strict=True)
    )

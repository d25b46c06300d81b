"""Methods known by their source, and copies of them in which one global name means something else."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

__all__ = ["SwapRefused", "fingerprint", "is_bare", "replaced", "untested", "with_globals"]

# Fields that do not change what a function does, or that differ between versions of Python.
_IGNORED = frozenset({"annotation", "returns", "decorator_list", "ctx", "kind", "type_comment", "type_params"})


class SwapRefused(RuntimeError):
    """A model was left as it is; the message says which sites were not recognised, and why."""


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _canonical(node: Any) -> str:
    """A syntax tree as text, the same for every Python version, layout, comment, docstring and annotation."""
    if isinstance(node, list):
        return "[" + " ".join(_canonical(item) for item in node if not _is_text(item)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [
        f"{name}={_canonical(value)}"
        for name, value in ast.iter_fields(node)
        if name not in _IGNORED and value is not None and value != []
    ]
    return f"{type(node).__name__}({' '.join(parts)})"


@functools.cache
def fingerprint(function: Callable[..., Any]) -> str:
    """16 hexadecimal digits of what the function's source does; "no source" where there is none to read."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return "no source"
    return hashlib.sha256(_canonical(tree.body[0]).encode()).hexdigest()[:16]


def untested(name: str, function: Any, tested: Mapping[str, Collection[str]], versions: str) -> str | None:
    """Why a function cannot be relied on: its source is not among those of `name` that were tested; or None."""
    found = fingerprint(function) if callable(function) else "missing"
    return None if found in tested.get(name, ()) else f"{name} has an untested source ({found}); tested: {versions}"


def _is_own(value: Any, module: nn.Module, name: str) -> bool:
    """Whether a value is the class's method, bound to the instance."""
    function = getattr(type(module), name, None)
    return getattr(value, "__self__", None) is module and getattr(value, "__func__", None) is function


def is_bare(module: nn.Module, name: str = "forward") -> bool:
    """Whether a method of an instance is its class's; hooks that were removed leave it bound in the instance."""
    return name not in vars(module) or _is_own(vars(module)[name], module, name)


def replaced(module: nn.Module, *names: str) -> str | None:
    """Why methods of an instance (its forward, where no name is given) are not those of its class; or None."""
    taken = [name for name in names or ("forward",) if not is_bare(module, name)]
    if not taken:
        return None
    around = "_hf_hook" in vars(module) and _is_own(vars(module).get("_old_forward"), module, "forward")
    if taken == ["forward"] and around:
        return "accelerate's hooks lie around its forward"
    return f"its {', '.join(taken)} was replaced by someone else"


def with_globals(function: types.FunctionType, **replacements: Any) -> types.FunctionType:
    """The same code with some of its global names meaning something else, for this copy alone.

    So a method keeps every line that its library wrote, and only the call in question goes elsewhere. The copy has no
    `__name__` among its globals: torch.compile would otherwise look the names up in the real module.
    """
    missing = [name for name in replacements if name not in function.__code__.co_names]
    if missing:
        raise SwapRefused(f"{function.__qualname__} does not call {', '.join(missing)}")
    scope = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    copy = types.FunctionType(
        function.__code__,
        {**scope, **replacements},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__doc__ = function.__doc__
    return copy

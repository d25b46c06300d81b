"""Methods known by their source, and copies of them in which one global name means something else."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

__all__ = ["SwapRefused", "fingerprint", "with_globals"]

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

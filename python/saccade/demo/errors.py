"""The one error that a user of the demo sees."""

from __future__ import annotations

__all__ = ["DemoError"]


class DemoError(Exception):
    """Something the user can put right, said in one sentence; the command line ends with exit code 2."""

"""PEP 517 backend: setuptools', plus torch among the build requirements only where the environment has none."""

import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def find_torch():
    """Path of an installed torch with the stable-ABI headers, or None. An isolated build still sees the real site-packages
    by path, so nothing is downloaded a second time."""
    for place in filter(None, [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
        torch = Path(place) / "torch"
        if (torch / "include/torch/csrc/stable/library.h").exists():
            return torch
    return None


def _torch_if_missing():
    return [] if find_torch() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_if_missing()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_if_missing()]

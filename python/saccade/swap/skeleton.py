"""A model from its config alone, without weights: on torch's meta device, so that any size can be planned on any machine."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["SkeletonError", "skeleton"]

_FORMS = (
    "expected a folder with a config.json or model_index.json, a config file, the name of a model on the Hub that "
    "can be fetched, or timm:NAME"
)


class SkeletonError(ValueError):
    """No model could be made of what was given; the message says why."""


class _Pipeline:
    """Stands for a pipeline: what has parameters in it."""

    def __init__(self, components: dict[str, nn.Module]) -> None:
        self.components = components


def skeleton(source: str) -> Any:
    """A model, or a pipeline's components, without weights.

    Args:
        source: a folder of transformers or diffusers (a pipeline's, too), a config.json, a Hub name, or "timm:" and a name of timm.

    Raises:
        SkeletonError: where none can be made.
    """
    if source.startswith("timm:"):
        return _timm(source.removeprefix("timm:"))
    path = Path(source).expanduser()
    if not path.exists():
        if source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith(".json"):
            raise SkeletonError(f"model: {source} does not exist; {_FORMS}")
        return _from_hub(source)
    if path.is_dir():
        index = path / "model_index.json"
        return _pipeline(index) if index.exists() else _from_file(path / "config.json")
    return _pipeline(path) if path.name == "model_index.json" else _from_file(path)


def _need(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SkeletonError(f"model: {name} is not installed; run: pip install 'saccade[models]'") from error


def _timm(name: str) -> nn.Module:
    timm = _need("timm")
    if not timm.is_model(name):
        raise SkeletonError(f"model: timm knows no model {name!r}; timm.list_models() lists them")
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SkeletonError(f"model: {path} does not exist; {_FORMS}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SkeletonError(f"model: {path} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise SkeletonError(f"model: {path} holds a {type(data).__name__}, expected the object of a config")
    return data


def _from_file(path: Path) -> nn.Module:
    data = _read(path)
    return _diffusers(data, path) if "_class_name" in data else _transformers(str(path), path, data)


def _diffusers(data: dict[str, Any], path: Path) -> nn.Module:
    diffusers = _need("diffusers")
    cls = getattr(diffusers, data["_class_name"], None)
    if cls is None or not hasattr(cls, "from_config"):
        raise SkeletonError(
            f"model: {path} is for {data['_class_name']}, which diffusers {diffusers.__version__} does not have"
        )
    try:
        with torch.device("meta"):
            model: nn.Module = cls.from_config(data)
    except (TypeError, ValueError, KeyError) as error:
        raise SkeletonError(f"model: {data['_class_name']} cannot be made of {path}: {error}") from error
    return model


def _pipeline(index: Path) -> _Pipeline:
    _need("diffusers")
    found: dict[str, nn.Module] = {}
    for name in _read(index):
        folder = index.parent / name
        config = folder / "config.json"
        if config.exists() and "_class_name" in _read(config) and name.startswith("transformer"):
            found[name] = _from_file(config)
    if not found:
        raise SkeletonError(f"model: {index} names no transformer that has a config beside it")
    return _Pipeline(found)


def _from_hub(name: str) -> nn.Module:
    transformers = _need("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:
        raise SkeletonError(f"model: {name} could not be fetched ({str(error).splitlines()[0]}); {_FORMS}") from error
    return _build(transformers, config)


def _transformers(source: str, path: Path, data: dict[str, Any]) -> nn.Module:
    transformers = _need("transformers")
    if "model_type" not in data:
        raise SkeletonError(f"model: {path} has neither a _class_name (diffusers) nor a model_type (transformers)")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except Exception as error:
        raise SkeletonError(f"model: transformers cannot read {path}: {str(error).splitlines()[0]}") from error
    return _build(transformers, config)


def _build(transformers: Any, config: Any) -> nn.Module:
    names = getattr(config, "architectures", None) or []
    cls = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModel.from_config(config) if cls is None else cls(config)
    return model

"""What the swaps of the Qwen-VL families rely on: functions of transformers, known by their source."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from saccade.swap.source import replaced, untested

__all__ = ["attention_functions", "forward_of", "reason_of", "tower_functions"]

VERSIONS = "transformers 5.19 to 5.24"
# Names without a class are functions of the module that holds the class. Where there are two, the older is that of 5.19.
_TESTED: dict[str, set[str]] = {
    # Qwen2-VL
    "Qwen2VisionTransformerPretrainedModel.forward": {"be3333c3c4cdb941"},
    "VisionAttention.forward": {"29b7e4f009669734"},
    "Qwen2VLVisionRotaryEmbedding.forward": {"507dd73388b43678", "b9e87f2a4ed1e75f"},
    "Qwen2VLVisionRotaryEmbedding.recomposition_frequencies": {"4811bb19d0c381dc"},
    "Qwen2VLTextModel.forward": {"76b0d428baeb42de", "648b90a0c70662b1"},
    "Qwen2VLAttention.forward": {"f95bad3f45b4d3d5", "9329751909242c42"},
    "Qwen2VLRotaryEmbedding.forward": {"08e5738ba5c1eba9"},
    "Qwen2VLRotaryEmbedding.recomposition_frequencies": {"9229acb58e999fb9"},
    "Qwen2VLModel.forward": {"a705c95b593592ac", "4edfe8ded2bd1106"},
    "Qwen2VLModel.get_rope_index": {"72adf0292ca290dc"},
    "Qwen2VLModel.compute_3d_position_ids": {"3527a137323868f7", "890543bedd5d553d"},
    # Qwen2.5-VL
    "Qwen2_5_VisionTransformerPretrainedModel.forward": {"7ccf4e4ce0e945f9"},
    "Qwen2_5_VisionTransformerPretrainedModel.permute_input_for_window_attn": {"e0bac5a7486d7dd2"},
    "Qwen2_5_VLVisionAttention.forward": {"29b7e4f009669734"},
    "Qwen2_5_VLVisionRotaryEmbedding.forward": {"507dd73388b43678", "b9e87f2a4ed1e75f"},
    "Qwen2_5_VLVisionRotaryEmbedding.recomposition_frequencies": {"4811bb19d0c381dc"},
    "Qwen2_5_VLTextModel.forward": {"76b0d428baeb42de", "648b90a0c70662b1"},
    "Qwen2_5_VLAttention.forward": {"f95bad3f45b4d3d5", "9329751909242c42"},
    "Qwen2_5_VLRotaryEmbedding.forward": {"08e5738ba5c1eba9"},
    "Qwen2_5_VLRotaryEmbedding.recomposition_frequencies": {"9229acb58e999fb9"},
    "Qwen2_5_VLModel.forward": {"afd8f7a8a0dcaa53", "35cce718d2b5e34c"},
    "Qwen2_5_VLModel.get_rope_index": {"142858d1be5bec5e"},
    "Qwen2_5_VLModel.compute_3d_position_ids": {"494f75df3da5f267", "956bff13716956e2"},
    # Qwen3-VL
    "Qwen3VLVisionModel.forward": {"0faa4797883f7704"},
    "Qwen3VLVisionAttention.forward": {"29b7e4f009669734"},
    "Qwen3VLVisionRotaryEmbedding.forward": {"507dd73388b43678", "b9e87f2a4ed1e75f"},
    "Qwen3VLVisionRotaryEmbedding.recomposition_frequencies": {"4811bb19d0c381dc"},
    "Qwen3VLTextModel.forward": {"b0e0b145a525bc3e", "ff9ea809cc4cbc4b"},
    "Qwen3VLTextAttention.forward": {"6e906d21d9872e5b", "fa95dad1140d2ff5"},
    "Qwen3VLTextRotaryEmbedding.forward": {"08e5738ba5c1eba9"},
    "Qwen3VLTextRotaryEmbedding.recomposition_frequencies": {"adc2a1066f42b124"},
    # of all three
    "apply_rotary_pos_emb": {"47303886caff1139"},
    "apply_rotary_pos_emb_vision": {"b22538b48db062cc"},
    "rotate_half": {"383337a389901e48"},
    "get_vision_attention_seqlens": {"63b842957fa9418c"},
    "get_vision_window_index": {"01ba7f31b5fd44c8"},
    "get_max_seqlen": {"ceae2f21478bd8d7"},
    "is_flash_attention_requested": {"f0e0cb8ba801c087"},
}


def forward_of(module: nn.Module) -> Any:
    """The forward that the module's class defines, without its decorators."""
    return inspect.unwrap(type(module).forward)


def _globals(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    scope = getattr(forward_of(module), "__globals__", {})
    return {name: scope.get(name) for name in names}


def _methods(module: nn.Module, *names: str) -> dict[str, Any]:
    return {f"{type(module).__name__}.{name}": getattr(type(module), name, None) for name in names}


def attention_functions(attention: nn.Module, rotate: str | None) -> dict[str, Callable[..., Any] | None]:
    """What an attention site relies on.

    Args:
        attention: the module.
        rotate: the function by which it rotates, where that is replaced; None where the packed call alone goes there.
    """
    found = _methods(attention, "forward")
    if rotate is not None:
        return {**found, **_globals(attention, (rotate, "rotate_half"))}
    return {**found, **_globals(attention, ("get_max_seqlen", "is_flash_attention_requested"))}


def tower_functions(tower: nn.Module, rotary: nn.Module) -> dict[str, Callable[..., Any] | None]:
    """What the positions go through on their way from the rotary module to attention."""
    window = ("permute_input_for_window_attn",) if hasattr(type(tower), "permute_input_for_window_attn") else ()
    return {**_methods(tower, "forward", *window), **_methods(rotary, "forward", "recomposition_frequencies")}


def model_functions(model: nn.Module) -> dict[str, Callable[..., Any] | None]:
    """What computes the positions of text and video."""
    return _methods(model, "forward", "get_rope_index", "compute_3d_position_ids")


def merging_functions(model: nn.Module) -> dict[str, Callable[..., Any] | None]:
    """What hands embeddings, positions and mask to the language model, and the language model itself."""
    text: Any = model.language_model
    return {**_methods(model, "forward", "compute_3d_position_ids"), **_methods(text, "forward")}


def offset_functions(tower: nn.Module) -> dict[str, Callable[..., Any] | None]:
    """What computes the offsets of frames and windows, and takes them computed."""
    names = ("get_vision_attention_seqlens", "get_vision_window_index")
    scope = _globals(tower, names)
    return {**_methods(tower, "forward"), **{name: scope[name] for name in names if scope[name] is not None}}


def reason_of(functions: Mapping[str, Any], *modules: nn.Module) -> str | None:
    """Why a site cannot be swapped: a function is not one that was tested, or a module has another forward; or None."""
    for name, function in functions.items():
        reason = untested(name, function, _TESTED, VERSIONS)
        if reason is not None:
            return reason
    return next(filter(None, map(replaced, modules)), None)

"""Rotary embeddings of transformers' Qwen2.5-VL: vision and text attention turned by `saccade.rope.apply_rope`.

Stock makes tables of cos and sin once per forward and hands them through every layer. Here the two rotary modules hand
on the positions instead, and attention turns q and k by them: no table is made, and any `RopeSpec` can be used. The
attention forwards keep their own code; only the function that they call to rotate is another one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from saccade._dispatch import Impl
from saccade.rope.apply_rope import apply_rope
from saccade.rope.presets import mrope, qwen_vision
from saccade.rope.spec import RopeSpec
from saccade.swap.instance import Site, Swap, fingerprint, with_globals

__all__ = ["rotary", "text_spec_of", "turned_by", "vision_spec_of"]

Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(q [B, Hq, S, D], k [B, Hk, S, D], positions [A, B|1, S]) -> q and k, turned."""

# Fingerprints of the sources that the swap relies on: transformers 5.19 to 5.24.
_TESTED = {
    "Qwen2_5_VLTextModel.forward": {"648b90a0c70662b1", "76b0d428baeb42de"},  # 5.24: the cache has another name
    "Qwen2_5_VLRotaryEmbedding.forward": {"08e5738ba5c1eba9"},
    "Qwen2_5_VLRotaryEmbedding.recomposition_frequencies": {"9229acb58e999fb9"},
    "Qwen2_5_VLAttention.forward": {"9329751909242c42", "f95bad3f45b4d3d5"},
    "apply_rotary_pos_emb": {"47303886caff1139"},
    "rotate_half": {"383337a389901e48"},
    "Qwen2_5_VisionTransformerPretrainedModel.forward": {"7ccf4e4ce0e945f9"},
    "permute_input_for_window_attn": {"e0bac5a7486d7dd2"},
    "Qwen2_5_VLVisionRotaryEmbedding.forward": {"507dd73388b43678", "b9e87f2a4ed1e75f"},  # newer; 5.19
    "Qwen2_5_VLVisionRotaryEmbedding.recomposition_frequencies": {"4811bb19d0c381dc"},
    "Qwen2_5_VLVisionAttention.forward": {"29b7e4f009669734"},
    "apply_rotary_pos_emb_vision": {"b22538b48db062cc"},
}
_TEXT = ("Qwen2_5_VLTextModel", "rotary_emb", "layers", "self_attn", "apply_rotary_pos_emb")
_VISION = (
    "Qwen2_5_VisionTransformerPretrainedModel",
    "rotary_pos_emb",
    "blocks",
    "attn",
    "apply_rotary_pos_emb_vision",
)


def _head_dim(config: Any) -> int:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width)


def text_spec_of(config: Any) -> RopeSpec:
    """M-RoPE of a text config; ValueError where its rope_type is not the plain one."""
    parameters = config.rope_parameters
    if parameters["rope_type"] != "default":
        raise ValueError(f"text_spec: rope_type {parameters['rope_type']!r} needs a RopeSpec of your own")
    sections = parameters.get("mrope_section", [16, 24, 24])
    return mrope(_head_dim(config), parameters["rope_theta"], sections)


def vision_spec_of(config: Any) -> RopeSpec:
    """The two-dimensional embedding of a vision config."""
    return qwen_vision(_head_dim(config), config.rope_parameters["rope_theta"])


def _by_spec(spec: RopeSpec, impl: Impl, inplace: bool) -> Turn:
    def turn(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        free = inplace and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
        out, k_out = apply_rope(q, k, positions, spec, inplace=free, impl=impl)
        assert k_out is not None
        return out, k_out

    return turn


# What the two rotary modules return in place of (cos, sin): the positions, twice, because their callers unpack two.
def _text_positions(self: nn.Module, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    positions = position_ids.expand(3, -1, -1)
    return positions, positions


def _vision_positions(
    self: nn.Module, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return position_ids, position_ids  # [N, 2]: the tower sorts the rows into windows, as it does with tables


def _text_call(turn: Turn) -> Callable[..., Any]:
    def rotate(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, _: torch.Tensor) -> Any:
        return turn(q, k, positions)

    return rotate


def _vision_call(turn: Turn) -> Callable[..., Any]:
    def rotate(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, _: torch.Tensor) -> Any:
        q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))  # [N, H, D] -> [1, H, N, D], a view
        return tuple(x.squeeze(0).transpose(0, 1) for x in turn(q, k, positions.t().unsqueeze(1)))

    return rotate


def _relied_on(tower: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    """The functions whose source must be the tested one, by name."""
    _, rotary_name, layers, attention, call = names
    rotary_module = getattr(tower, rotary_name)
    attention_class = type(getattr(getattr(tower, layers)[0], attention))
    forward = inspect.unwrap(attention_class.forward)
    functions = {
        f"{type(tower).__name__}.forward": type(tower).forward,
        f"{type(rotary_module).__name__}.forward": type(rotary_module).forward,
        f"{type(rotary_module).__name__}.recomposition_frequencies": type(rotary_module).recomposition_frequencies,
        f"{attention_class.__name__}.forward": forward,
        call: getattr(forward, "__globals__", {}).get(call),
        "rotate_half": getattr(forward, "__globals__", {}).get("rotate_half"),
    }
    if names is _VISION:
        functions["permute_input_for_window_attn"] = type(tower).permute_input_for_window_attn  # type: ignore[attr-defined]
    return functions


def _unknown(tower: nn.Module, names: tuple[str, ...]) -> str | None:
    """Why the tower's source is not one that was tested, or None."""
    try:
        functions = _relied_on(tower, names)
    except (AttributeError, IndexError) as error:
        return f"its layout is not the tested one ({error})"
    for name, function in functions.items():
        found = fingerprint(function) if callable(function) else "missing"
        if found not in _TESTED.get(name, ()):
            return f"{name} has an untested source ({found}); tested are those of transformers 5.19 to 5.24"
    return None


def _sites(prefix: str, tower: nn.Module, names: tuple[str, ...], turn: Turn) -> list[Site]:
    _, rotary_name, layers, attention, call = names
    reason = _unknown(tower, names)
    path = f"{prefix}.{rotary_name}".lstrip(".")
    role = "positions"
    if reason is not None:
        return [Site(path, getattr(tower, rotary_name, tower), role, reason=reason)]
    give, wrap = (_text_positions, _text_call) if names is _TEXT else (_vision_positions, _vision_call)
    sites = [Site(path, getattr(tower, rotary_name), role, give)]
    forward: Any = None
    for index, layer in enumerate(getattr(tower, layers)):
        module = getattr(layer, attention)
        if forward is None:
            forward = with_globals(inspect.unwrap(type(module).forward), **{call: wrap(turn)})
        sites.append(Site(f"{prefix}.{layers}.{index}.{attention}".lstrip("."), module, "attention", forward))
    return sites


def turned_by(model: nn.Module, *, text: Turn | None = None, vision: Turn | None = None) -> Swap:
    """A swap in which `text` and `vision` turn q and k; None leaves that part of the model alone.

    SwapRefused comes from `apply`, not from here; the result lists each site with its reason.
    """
    sites = []
    for path, module in model.named_modules():
        for names, turn in ((_TEXT, text), (_VISION, vision)):
            if turn is not None and type(module).__name__ == names[0]:
                sites += _sites(path, module, names, turn)
    return Swap(sites)


def _check_frequencies(tower: nn.Module, names: tuple[str, ...], spec: RopeSpec) -> None:
    """The model's own spec comes from its config, so a buffer that was changed by hand must not be passed over."""
    buffer = getattr(getattr(tower, names[1], None), "inv_freq", None)
    if not isinstance(buffer, torch.Tensor) or buffer.device.type == "meta":
        return
    expected = torch.tensor(spec.inv_freq[: buffer.numel()], dtype=torch.float64)
    # Computed in fp32 at best, where a power is off by its logarithm (up to 14 for base 1e6) times an eps.
    eps = max(torch.finfo(dtype).eps for dtype in (buffer.dtype, torch.float32))
    if not torch.allclose(buffer.double().cpu(), expected, rtol=32 * eps, atol=0.0):
        kind = "text" if names is _TEXT else "vision"
        raise ValueError(f"{kind}_spec: inv_freq of the model is not that of its config; pass a RopeSpec of your own")


def _check_spec(name: str, spec: RopeSpec, config: Any, axes: int) -> None:
    if not isinstance(spec, RopeSpec):
        raise TypeError(f"{name}: expected a RopeSpec, got {type(spec).__name__}")
    if spec.head_dim != _head_dim(config) or spec.axes != axes:
        raise ValueError(
            f"{name}: expected head_dim {_head_dim(config)} and {axes} position axes, "
            f"got head_dim {spec.head_dim} and {spec.axes}"
        )


def rotary(
    model: nn.Module,
    *,
    text_spec: RopeSpec | None = None,
    vision_spec: RopeSpec | None = None,
    impl: Impl = "auto",
    inplace: bool = False,
) -> Swap:
    """Turn q and k in vision and text attention of a Qwen2.5-VL model with Saccade.

    Args:
        model: any module that holds transformers' Qwen2.5-VL (a PEFT wrapper too). Its classes, parameters and
            state_dict keys stay as they are.
        text_spec: of three axes (t, h, w); by default the model's own M-RoPE. With `hope` or `videorope`, give the
            model `position_ids` of `multimodal_positions`; float64 ones are taken as they are.
        vision_spec: of two axes (h, w); by default the model's own.
        impl: as in `saccade.rope.apply_rope`.
        inplace: rotate what the projections returned without a copy where no gradient is needed. A forward hook that
            keeps the output of a projection then sees it rotated.

    Returns:
        a `Swap`: use it as a context manager, or call `apply` and `restore`. `apply` raises SwapRefused with the reasons,
        and changes nothing, where a forward is not one that was tested.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    turns: dict[str, Turn] = {}
    kinds = (
        (_TEXT, "text", text_spec, text_spec_of, 3),
        (_VISION, "vision", vision_spec, vision_spec_of, 2),
    )
    for module in model.modules():
        for names, kind, given, default, axes in kinds:
            if type(module).__name__ != names[0]:
                continue
            spec = default(module.config) if given is None else given
            if given is None:
                _check_frequencies(module, names, spec)
            _check_spec(f"{kind}_spec", spec, module.config, axes)
            turns[kind] = _by_spec(spec, impl, inplace)
    return turned_by(model, **turns)

"""Vision towers of transformers: SigLIP, CLIP and InternVL (with token merging), VideoMAE and ViViT, as they are and inside a captioner.

LLaVA-OneVision holds a SigLIP tower, LLaVA-NeXT-Video and Video-LLaVA hold CLIP towers. Text towers are listed, and left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from saccade.swap.attend import attends
from saccade.swap.edit import Attribute, Edit, PreHook, method
from saccade.swap.families import looks_like_attention
from saccade.swap.merging import Merging, lacking
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.source import untested
from saccade.swap.tokens import Tokens
from saccade.swap.transformers import _tower_merging as forwards
from saccade.swap.transformers._interface import Call, Watch, attention_edits, forward_reason
from saccade.swap.transformers._text import Text

__all__ = ["ADAPTERS"]

_VERSIONS = "transformers 5.24"
_TESTED: dict[str, set[str]] = {
    "SiglipAttention.forward": {"cf4800b43021684a"},
    "SiglipEncoderLayer.forward": {"cdaad3b51957d6e9"},
    "SiglipEncoder.forward": {"592739b465a11952"},
    "SiglipVisionModel.forward": {"a34ed3f2561d4b5b"},
    "CLIPAttention.forward": {"054b19d9c7d5aa2a"},
    "CLIPEncoderLayer.forward": {"cdaad3b51957d6e9"},
    "CLIPEncoder.forward": {"592739b465a11952"},
    "CLIPVisionModel.forward": {"15e5d4a7c33501bf"},
    "InternVLVisionAttention.forward": {"40747597b2de3e7d"},
    "InternVLVisionLayer.forward": {"107c1a0567e2398d"},
    "InternVLVisionEncoder.forward": {"583a6604080493a6"},
    "InternVLVisionModel.forward": {"5075b62a1dbc03cc"},
    "VideoMAESelfAttention.forward": {"004953131a03dbbc"},
    "VivitAttention.forward": {"8168c2dd89581991"},
    # relied on where tokens are merged: hidden states are the first output of a layer, and checkpointing lies in a layer's forward
    "capture_outputs": {"a2ca3ec093660cea"},
    "install_output_capuring_hook": {"68d2b9b138f78aec"},
    "GradientCheckpointingLayer.__init_subclass__": {"2e99d44c3d69dd52"},
}


@dataclass(frozen=True)
class _Mergeable:
    """What is needed to merge in a tower.

    Args:
        layers: the name of the encoder's list of layers.
        layer: the forward that a layer gets.
        given: what a layer takes behind the tokens.
        tokens: of an image, from the tower.
    """

    layers: str
    layer: Callable[..., Any]
    given: tuple[None, ...]
    tokens: Callable[[Any], int]


class Tower(Adapter):
    """A vision tower.

    Args:
        family, roots, grid: as in `Adapter`.
        attention: the path of a layer's attention.
        prefix: class tokens.
        joint: whether all frames are seen at once; otherwise each is an image of its own.
        mergeable: for merging, or None.
    """

    package = "transformers"

    def __init__(
        self,
        family: str,
        roots: tuple[str, ...],
        grid: tuple[int, int, int],
        attention: str,
        *,
        prefix: int = 0,
        joint: bool = False,
        mergeable: _Mergeable | None = None,
    ) -> None:
        self.family, self.roots, self.grid, self.prefix = family, roots, grid, prefix
        self.attention, self.joint, self.mergeable = attention, joint, mergeable

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """The video's tokens alone."""
        return Tokens(grid or self.grid)

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """Merging, where the family has it, and every attention: of the layers, and of a pooling head."""
        at = f"{path}." if path else ""
        layers = list(self._layers(root))
        if not layers:
            elsewhere = f"{type(root).__name__} holds no layers where they are in the tested {_VERSIONS}"
            return [
                Site(at + name, module, "attention", "vision", reason=elsewhere)
                for name, module in root.named_modules()
                if looks_like_attention(module)
            ]
        of_layer = {id(one.get_submodule(self.attention)): i for i, one in enumerate(layers)}
        frames = tokens.grid[0]
        count = tokens.video + self.prefix * (1 if self.joint else frames)
        found = []
        if self.mergeable is not None:
            reason = self._merge_reason(root, layers)
            depth = len(layers)
            found.append(
                Site(f"{at}encoder", root.encoder, "merge", "vision", frozenset({"merge"}), None, depth, reason)
            )
        for name, module in root.named_modules():
            if not looks_like_attention(module):
                continue
            layer = of_layer.get(id(module))
            if layer is None:  # the pooling head's probe looks at all tokens
                found.append(Site(at + name, module, "attention", "cross", depth=len(layers)))
                continue
            heads, width = _heads(module)
            found.append(
                Site(
                    at + name, module, "attention", "vision", frozenset({"stock", "dense"}), layer, len(layers),
                    forward_reason(module, _TESTED, _VERSIONS), heads, heads, width, (count, count),
                    1.0 if self.joint else float(frames),
                )
            )  # fmt: skip
        return found

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """The forward of each chosen attention; where tokens are merged, of every one, and of tower, encoder and layers."""
        merge = next((choice for choice in choices if choice.site.kind == "merge"), None)
        chosen = {id(choice.site.module): choice for choice in choices if choice.site.kind == "attention"}
        at = f"{path}." if path else ""
        if merge is not None:
            merge.reason = lacking(merge.rules[0].params)
            merge = merge if merge.reason is None else None
        call, edits = Call(), []
        names = {id(module): name for name, module in root.named_modules()}
        layers = list(self._layers(root))
        for i, one in enumerate(layers):
            attention = one.get_submodule(self.attention)
            choice = chosen.get(id(attention))
            if choice is None and merge is None:
                continue
            attend = None if choice is None else attends(call.context, choice.rules, i)
            edits += attention_edits(at + names[id(attention)], attention, call, attend)
            if choice is not None:
                choice.change = "fused attention in the module's own forward"
        if merge is not None:
            edits += self._merge_edits(at, path, root, layers, names, merge, call)
        if edits:
            extra.contexts.append(call.context)
            edits.append(PreHook(path, root, Watch(call)))
        return edits

    def _layers(self, root: Any) -> Iterator[nn.Module]:
        for name in ("encoder.layers", "encoder.layer", "decoder_layers", "layers"):
            try:
                layers: Any = root.get_submodule(name)
            except AttributeError:
                continue
            yield from layers
            return

    def _merge_reason(self, root: Any, layers: list[nn.Module]) -> str | None:
        """Why tokens cannot be merged: the first part that is not known; or None."""
        parts = [root, root.encoder, *layers, *(one.get_submodule(self.attention) for one in layers)]
        for part in parts:
            reason = forward_reason(part, _TESTED, _VERSIONS)
            if reason is not None:
                return reason
        capture = inspect.unwrap(type(root).forward).__globals__["capture_outputs"]
        base: Any = next(cls for cls in type(layers[0]).__mro__ if cls.__name__ == "GradientCheckpointingLayer")
        for what, function in (
            ("capture_outputs", capture),
            ("install_output_capuring_hook", capture.__globals__.get("install_output_capuring_hook")),
            ("GradientCheckpointingLayer.__init_subclass__", base.__init_subclass__.__func__),
        ):
            reason = untested(what, function, _TESTED, _VERSIONS)
            if reason is not None:
                return reason
        return None

    def _merge_edits(
        self, at: str, path: str, root: Any, layers: list[nn.Module], names: dict[int, str], merge: Choice, call: Call
    ) -> list[Edit]:
        assert self.mergeable is not None
        rule, parts = merge.rules[0], self.mergeable
        merging = Merging.of(rule.params, len(layers), self.prefix, early=True)
        width, inner = root.config.hidden_size, root.config.intermediate_size
        merge.change = merging.change(parts.tokens(root), width, inner / width)
        state = forwards.Merged(merging, rule, call, parts.layers, parts.given)
        edits: list[Edit] = []
        for where, module, forward in (
            (path, root, forwards.tower_forward),
            (f"{at}encoder", root.encoder, forwards.encoder_forward),
        ):
            edits.append(Attribute(where, module, forwards.STATE, state))
            edits.append(Attribute(where, module, "forward", method(forward, module)))
        edits += [Attribute(at + names[id(one)], one, "forward", method(parts.layer, one)) for one in layers]
        return edits


def _heads(module: Any) -> tuple[int, int]:
    """Heads and their width: families name them differently."""
    heads = module.num_heads if hasattr(module, "num_heads") else module.num_attention_heads
    return int(heads), int(module.head_dim if hasattr(module, "head_dim") else module.attention_head_size)


_SIGLIP = _Mergeable("layers", forwards.pre_norm_layer, (None,), lambda root: int(root.embeddings.num_positions))
_INTERN = _Mergeable(
    "layer", forwards.intern_layer, (), lambda root: int(root.embeddings.patch_embeddings.num_patches) + 1
)

ADAPTERS: list[Adapter] = [
    Tower("siglip", ("SiglipVisionModel",), (1, 27, 27), "self_attn", mergeable=_SIGLIP),
    Tower("clip", ("CLIPVisionModel",), (1, 24, 24), "self_attn", prefix=1, mergeable=_SIGLIP),
    Tower("internvl", ("InternVLVisionModel",), (1, 32, 32), "attention", prefix=1, mergeable=_INTERN),
    Tower("videomae", ("VideoMAEModel", "VideoMAEDecoder"), (8, 14, 14), "attention.attention", joint=True),
    Tower("vivit", ("VivitModel",), (16, 14, 14), "attention", prefix=1, joint=True),
    Text("siglip", "SiglipTextModel"),
    Text("clip", "CLIPTextModel"),
]

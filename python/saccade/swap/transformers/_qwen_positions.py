"""Positions of HoPE and VideoRoPE, in place of those that Qwen2-VL and Qwen2.5-VL compute for text and video."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from saccade.rope import RopeSpec, hope, multimodal_positions, videorope

__all__ = ["RopeIndex", "other_spec", "params_reason"]

Tensor = torch.Tensor
_VIDEO = 2  # mm_token_type_ids: 0 text, 1 image, 2 video


def params_reason(params: Mapping[str, Any], family: str) -> str | None:
    """Why the parameters of a rotary rule cannot be followed in a family's text, or None."""
    positions, gamma = params.get("positions", "mrope"), params.get("gamma")
    if positions not in ("mrope", "hope", "videorope"):
        return f"positions: expected mrope, hope or videorope, got {positions!r}"
    if positions == "mrope":
        return None if gamma is None else "gamma: M-RoPE, the model's own, has no temporal stride"
    if family == "qwen3_vl":
        return "positions: each frame is a grid of its own between texts that tell the time; a temporal stride has nothing to act on"
    if gamma is None and positions == "hope":
        return "gamma: hope needs a number (paper: 0.75 for retrieval, 1.5 for understanding)"
    if gamma is not None and (isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or gamma <= 0):
        return f"gamma: expected a number above 0, got {gamma!r}"
    return None


def other_spec(own: RopeSpec, positions: str, base: float) -> RopeSpec:
    """The frequencies that go with the positions."""
    return hope(own.head_dim, base) if positions == "hope" else videorope(own.head_dim, base)


class RopeIndex:
    """`get_rope_index` of a model, by another rule.

    Args:
        rule: "hope" or "videorope".
        gamma: temporal stride of videos; None: the rule's own.
    """

    def __init__(self, rule: str, gamma: float | None) -> None:
        self.rule, self.gamma = rule, gamma

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        mm_token_type_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """(positions [3, B, S], what to add to the number of a later token [B, 1]), float64 where they are not whole.

        Args:
            model: tells how many patches make a token.
            input_ids: [B, S].
            mm_token_type_ids: [B, S]: 0 text, 1 image, 2 video.
            image_grid_thw, video_grid_thw: [n, 3] patches, in the order of the batch.
            attention_mask: [B, S], 0 for padding; padding stands at 0.
        """
        merge = model.config.vision_config.spatial_merge_size
        grids = {1: _sizes(image_grid_thw, merge), _VIDEO: _sizes(video_grid_thw, merge)}
        kinds = mm_token_type_ids.tolist()
        real = [[True] * len(row) for row in kinds] if attention_mask is None else attention_mask.bool().tolist()
        rows, deltas = [], []
        for kind, used in zip(kinds, real, strict=True):
            columns = [i for i, one in enumerate(used) if one]
            place, after = multimodal_positions(
                _segments([kind[i] for i in columns], grids), rule=self.rule, gamma=self.gamma
            )
            row = torch.zeros(3, len(kind), dtype=torch.float64)
            row[:, columns] = place.double()
            rows.append(row)
            deltas.append(after - len(columns))
        positions, delta = torch.stack(rows, 1), torch.tensor(deltas, dtype=torch.float64)[:, None]
        if bool((positions == positions.floor()).all() and (delta == delta.floor()).all()):
            positions, delta = positions.long(), delta.long()
        return positions.to(input_ids.device), delta.to(input_ids.device)


def _sizes(grids: Tensor | None, merge: int) -> Iterator[tuple[int, int, int]]:
    return iter([] if grids is None else [(t, h // merge, w // merge) for t, h, w in grids.tolist()])


def _segments(kinds: list[int], grids: dict[int, Iterator[tuple[int, int, int]]]) -> list[Any]:
    """Runs of one kind as `multimodal_positions` takes them."""
    segments: list[Any] = []
    for kind, run in itertools.groupby(kinds):
        count = len(list(run))
        if kind == 0:
            segments.append(count)
            continue
        while count > 0:  # videos may follow each other without text between them
            sizes = next(grids[kind], None)
            if sizes is None or sizes[0] * sizes[1] * sizes[2] > count:
                raise ValueError(f"mm_token_type_ids: a run of {count} tokens of kind {kind} does not fit the grids")
            segments.append(sizes)
            count -= sizes[0] * sizes[1] * sizes[2]
    return segments

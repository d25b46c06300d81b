"""Small Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and a video with text around it."""

from __future__ import annotations

from typing import Any

import torch

from saccade.demo import exact
from saccade.swap.edit import apply_all
from saccade.swap.transformers.qwen_rotary import turned_by
from swap.models import seeded

Tensor = torch.Tensor
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VIDEO, START, END = 60, 61, 62
GRID = (2, 8, 12)  # patches; windows of 4 x 4 of them


def qwen(family: str, **changes: Any) -> Any:
    """A model of three vision blocks and two text layers."""
    import transformers

    prefix = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    text: dict[str, Any] = dict(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        initializer_range=0.12, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
    )  # fmt: skip
    vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "initializer_range": 0.12}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 96}
    if family == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [2], "window_size": 56, "tokens_per_second": 2}
    if family == "qwen3_vl":
        text["head_dim"] = 32
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0], "patch_size": 14}
    ids = {"image_token_id": 59, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    config = getattr(transformers, f"{prefix}Config")(
        text_config={**text, **changes.pop("text", {})}, vision_config={**vision, **changes.pop("vision", {})}, **ids, **changes
    )  # fmt: skip
    return seeded(lambda: getattr(transformers, f"{prefix}ForConditionalGeneration")(config))


def qwen_inputs(family: str, seed: int = 2, grid: tuple[int, int, int] = GRID, batch: int = 3) -> dict[str, Any]:
    """Prompts of five tokens, a video, and four tokens; Qwen3-VL has text between the frames.

    Three of them: the largest error of one small sample says little about either side's.
    """
    g = torch.Generator().manual_seed(seed)
    t, h, w = grid
    count = h * w // 4
    frame = [START, *[VIDEO] * count, END]
    video = frame * t if family == "qwen3_vl" else [START, *[VIDEO] * (t * count), END]
    rows = []
    for _ in range(batch):
        before, after = (torch.randint(0, 58, (n,), generator=g).tolist() for n in (5, 4))
        rows.append([*before, *video, *after])
    ids = torch.tensor(rows)
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO).int() * 2,
        "pixel_values_videos": torch.randn(batch * t * h * w, 1176, generator=g),
        "video_grid_thw": torch.tensor([grid] * batch),
    }
    if family == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([1.0] * batch)
    return given


def twin(model: Any, family: str) -> Any:
    """A float64 copy that is float64 throughout: transformers' tables of cos and sin and its RMSNorm are fp32 in a double model."""
    copied = exact.double(model)
    text = getattr(copied.config, "text_config", None)
    vision = copied.config if text is None else copied.config.vision_config
    turn = None
    if text is not None:
        base, sections = text.rope_parameters["rope_theta"], text.rope_parameters["mrope_section"]
        turn = interleaved_turn(base, sections) if family == "qwen3_vl" else exact.mrope_turn(base, sections)
    apply_all(turned_by(copied, text=turn, vision=exact.vision_turn(vision.rope_parameters["rope_theta"])))
    return copied


def interleaved_turn(base: float, sections: list[int]) -> Any:
    """Pairs t, h, w, t, h, w, ... until h and w are used up, the rest t."""

    def turn(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        pairs = q.shape[-1] // 2
        axis = [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(pairs)]
        theta = base ** (-torch.arange(pairs, dtype=q.dtype) / pairs)
        angle = positions[axis].to(q.dtype).permute(1, 2, 0) * theta  # [B, S, pairs]
        cos, sin = (torch.cat((f(angle), f(angle)), -1)[:, None] for f in (torch.cos, torch.sin))
        q, k = (x * cos + torch.cat((-x[..., pairs:], x[..., :pairs]), -1) * sin for x in (q, k))
        return q, k

    return turn


def placed(model: Any, family: str) -> dict[str, Any]:
    """The same with the model's own positions: stock writes no cache of them into the model then."""
    given = qwen_inputs(family)
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask", "second_per_grid_ts")
    given["position_ids"], _ = model.model.get_rope_index(**{name: given[name] for name in names if name in given})
    return given


def tower_inputs(grid: tuple[int, int, int] = GRID, seed: int = 2) -> dict[str, Any]:
    """Patches of one video, for the vision tower alone."""
    g = torch.Generator().manual_seed(seed)
    t, h, w = grid
    return {"hidden_states": torch.randn(t * h * w, 1176, generator=g), "grid_thw": torch.tensor([grid])}

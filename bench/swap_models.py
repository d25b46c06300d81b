"""Models of the swap benchmark: real shapes with random weights, as many layers as fit the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


@dataclass(frozen=True)
class Task:
    """One case: a model, its call, the recipe, and what is promised.

    Args:
        name, shape: for the table.
        make: () -> (model in eval mode, function of the model that runs it and returns one tensor).
        recipe: of `saccade.accelerate`.
        lossless: the output must keep the numerics contract against float64; else its relative change is shown.
        wanted: least speed-up over stock eager.
        kept: what share of work the recipe keeps, in words.
    """

    name: str
    shape: str
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
    recipe: Any
    lossless: bool
    wanted: float
    kept: str


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qwen_tower(width: int, heads: int, inner: int, depth: int, frames: int, edge: int) -> Any:
    """Qwen2.5-VL's vision tower: windows of 112 pixels and four full layers, over a clip of `frames` x `edge`^2 pixels."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        depth=depth, hidden_size=width, num_heads=heads, intermediate_size=inner, out_hidden_size=2 * width,
        fullatt_block_indexes=[depth // 4 * (i + 1) - 1 for i in range(4)], window_size=112,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VisionTransformerPretrainedModel._from_config(config).eval()
    side = edge // 14
    grid = torch.tensor([[frames // 2, side, side]])
    pixels = _noise(int(grid.prod()), 3 * 2 * 14 * 14)

    def run(m: nn.Module) -> Tensor:
        p = next(m.parameters())
        out = m(pixels.to(p.device, p.dtype), grid_thw=grid.to(p.device))
        return out.pooler_output if hasattr(out, "pooler_output") and out.pooler_output is not None else out[0]

    return model, run


def siglip_tower(frames: int) -> Any:
    """SigLIP-Large/16 at 384: 576 tokens a frame, 24 layers of 1024."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=384,
        patch_size=16,
    )
    torch.manual_seed(0)
    model = SiglipVisionModel(config).eval()
    pixels = _noise(frames, 3, 384, 384)

    def run(m: nn.Module) -> Tensor:
        p = next(m.parameters())
        return m(pixel_values=pixels.to(p.device, p.dtype)).last_hidden_state

    return model, run


def wan_block(grid: tuple[int, int, int], layers: int) -> Any:
    """Wan 2.1 1.3B with as many blocks as asked, over `grid` tokens and 512 of text."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=layers
    ).eval()
    t, h, w = grid
    video, text = _noise(1, 16, t, 2 * h, 2 * w), _noise(1, 512, 4096, seed=2)

    def run(m: nn.Module) -> Tensor:
        p = next(m.parameters())
        step = torch.tensor([500], device=p.device)
        return m(video.to(p.device, p.dtype), step, text.to(p.device, p.dtype)).sample

    return model, run


def _sparse(density: float) -> dict[str, Any]:
    rule = {"kernel": "sliding_tile", "role": "self", "params": {"tile": [4, 4, 4], "density": density}}
    return {"name": f"rotary + sliding_tile {density:g}", "rules": [{"kernel": "rotary"}, rule]}


def _merge(keep: float) -> dict[str, Any]:
    rules = [{"kernel": "dense", "match": "*layers*"}, {"kernel": "merge", "params": {"keep": keep}}]
    return {"name": f"dense + merge {keep:g}", "rules": rules}


def tasks(device: str, quick: bool) -> list[Task]:
    """The three cases of the swaps: real widths on a GPU, reduced ones where a CPU would take hours."""
    if quick:
        return [
            Task(
                "Qwen2.5-VL vision tower",
                "4 layers of 160",
                lambda: qwen_tower(160, 2, 428, 4, 4, 168),
                "lossless",
                True,
                1.0,
                "all",
            ),
            Task(
                "Wan block",
                "1 block, 4 x 8 x 8",
                lambda: wan_block((4, 8, 8), 1),
                _sparse(0.25),
                False,
                0.0,
                "a quarter of the pairs",
            ),
        ]
    if device == "cuda":
        return [
            Task(
                "Qwen2.5-VL vision tower",
                "32 layers of 1280, 32 frames of 448 x 448",
                lambda: qwen_tower(1280, 16, 3420, 32, 32, 448),
                "lossless",
                True,
                1.3,
                "all",
            ),
            Task(
                "SigLIP-Large/16 at 384",
                "24 layers of 1024, 32 frames",
                lambda: siglip_tower(32),
                _merge(0.3),
                False,
                1.8,
                "30 % of the tokens at the end",
            ),
            Task(
                "Wan 2.1 1.3B",
                "4 of 30 blocks, 21 x 30 x 52 tokens",
                lambda: wan_block((21, 30, 52), 4),
                _sparse(0.25),
                False,
                1.5,
                "a quarter of the pairs",
            ),
        ]
    return [
        Task(
            "Qwen2.5-VL vision tower",
            "32 layers of 320, 8 frames of 336 x 336",
            lambda: qwen_tower(320, 4, 856, 32, 8, 336),
            "lossless",
            True,
            1.3,
            "all",
        ),
        Task(
            "SigLIP-Large/16 at 384",
            "24 layers of 1024, 4 frames",
            lambda: siglip_tower(4),
            _merge(0.3),
            False,
            1.8,
            "30 % of the tokens at the end",
        ),
        Task(
            "Wan 2.1 1.3B",
            "1 block, 16 x 32 x 32 tokens",
            lambda: wan_block((16, 32, 32), 1),
            _sparse(0.25),
            False,
            1.5,
            "a quarter of the pairs",
        ),
    ]

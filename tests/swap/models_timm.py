"""Small Vision Transformers of timm and open_clip, with random weights, and images for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def noisy(model: nn.Module) -> nn.Module:
    """In eval mode, every parameter moved: biases of zero and tiny class tokens would hide mistakes."""
    model = model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def timm_vit(seed: int = 0, name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    """25 patches and 1 class token, 4 blocks of 3 heads."""
    import timm

    torch.manual_seed(seed)
    sizes = {"img_size": 80, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    return noisy(timm.create_model(name, **{**sizes, **options}))


def open_clip_vit(seed: int = 0, **options: Any) -> Any:
    """open_clip's visual tower: 25 patches and 1 class token, 4 blocks of 3 heads."""
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        image_size=80, patch_size=16, width=48, layers=4, heads=3, mlp_ratio=2.0, output_dim=20
    )
    return noisy(VisionTransformer(**{**sizes, **options}))


def open_clip_model(name: str = "CLIP", seed: int = 0) -> Any:
    """A whole model of open_clip: "CLIP", "CustomTextCLIP" or "CoCa"."""
    import open_clip

    torch.manual_seed(seed)
    vision = dict(layers=3, width=64, head_width=16, patch_size=16, image_size=64)
    text = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=2)
    if name == "CoCa":
        from open_clip.coca_model import CoCa

        decoder = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=2)
        vision |= dict(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=6, output_tokens=True)
        text |= dict(embed_cls=True, output_tokens=True)
        return noisy(CoCa(32, multimodal_cfg=decoder, vision_cfg=vision, text_cfg=text))
    return noisy(getattr(open_clip, name)(32, vision_cfg=vision, text_cfg=text))


def images(batch: int = 2, seed: int = 5, dtype: torch.dtype = torch.float32, edge: int = 80) -> torch.Tensor:
    return torch.randn(batch, 3, edge, edge, generator=torch.Generator().manual_seed(seed)).to(dtype)

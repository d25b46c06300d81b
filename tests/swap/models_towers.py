"""Small vision towers of transformers, and captioners that hold them, with random weights; and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from swap.models import seeded

_VISION: dict[str, Any] = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=3, image_size=56, patch_size=8
)
_TEXT: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=512,
)  # fmt: skip
IMAGE, VIDEO = 60, 61
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}


def siglip(**changes: Any) -> nn.Module:
    """49 patches, 4 layers of 3 heads, a pooling head."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return seeded(lambda: SiglipVisionModel(SiglipVisionConfig(**{**_VISION, **changes})))


def clip(**changes: Any) -> nn.Module:
    """49 patches and a class token."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return seeded(lambda: CLIPVisionModel(CLIPVisionConfig(**{**_VISION, **changes})))


def internvl_tower(**changes: Any) -> nn.Module:
    """49 patches and a class token, q/k norm, layer scale."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    sizes = {**_VISION, "image_size": [56, 56], "patch_size": [8, 8], "use_qk_norm": True, "norm_type": "rms_norm"}
    return seeded(lambda: InternVLVisionModel(InternVLVisionConfig(**{**sizes, **changes})))


def videomae(**changes: Any) -> nn.Module:
    """2 x 16 patches."""
    from transformers import VideoMAEConfig, VideoMAEModel

    sizes = {**_VISION, "image_size": 32, "num_frames": 4, "tubelet_size": 2}
    return seeded(lambda: VideoMAEModel(VideoMAEConfig(**{**sizes, **changes})))


def videomae_pretraining() -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    sizes: dict[str, Any] = {**_VISION, "image_size": 32, "num_frames": 4, "tubelet_size": 2}
    decoder: dict[str, Any] = dict(
        decoder_num_attention_heads=2, decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_intermediate_size=48
    )
    return seeded(lambda: VideoMAEForPreTraining(VideoMAEConfig(**{**sizes, **decoder})))


def vivit(**changes: Any) -> nn.Module:
    """2 x 16 patches and a class token."""
    from transformers import VivitConfig, VivitModel

    sizes = {**_VISION, "image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]}
    return seeded(lambda: VivitModel(VivitConfig(**{**sizes, **changes})))


def timesformer(kind: str = "divided_space_time", **changes: Any) -> nn.Module:
    """4 frames of 16 patches and a class token."""
    from transformers import TimesformerConfig, TimesformerModel

    sizes = {**_VISION, "image_size": 32, "num_frames": 4, "attention_type": kind}
    return seeded(lambda: TimesformerModel(TimesformerConfig(**{**sizes, **changes})))


def pixels(model: Any, batch: int = 2, seed: int = 3) -> dict[str, torch.Tensor]:
    """Images for an image tower, clips for a video tower."""
    size = model.config.image_size
    size = size[0] if isinstance(size, (list, tuple)) else size
    frames = getattr(model.config, "num_frames", None)
    shape = (batch, 3, size, size) if frames is None else (batch, frames, 3, size, size)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


# ---- two towers ------------------------------------------------------------------------------------------------------------
def siglip_pair() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    text = {name: value for name, value in _TEXT.items() if name != "num_key_value_heads"}
    text |= {"hidden_size": 48, "num_attention_heads": 3, "projection_size": 48}
    return seeded(lambda: SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION)))


def clip_pair() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {name: value for name, value in _TEXT.items() if name != "num_key_value_heads"}
    return seeded(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24)))


# ---- captioners ------------------------------------------------------------------------------------------------------------
def _ids(visual: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 2, *visual, 5, 6, 7]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def llava_onevision(layer: int = -1) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """SigLIP and Qwen2; a clip of two frames. Pooling makes 16 of the 49 patches of a frame; a newline follows the clip."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        text_config={"model_type": "qwen2", **_TEXT},
        vision_feature_layer=layer, image_grid_pinpoints=[[56, 56]], **_TOKENS,
    )  # fmt: skip
    model = seeded(lambda: LlavaOnevisionForConditionalGeneration(config))
    clip_pixels = torch.randn(1, 2, 3, 56, 56, generator=torch.Generator().manual_seed(4))
    return model, {**_ids([VIDEO] * (2 * 16 + 1)), "pixel_values_videos": clip_pixels}


def llava_next_video() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """CLIP, of which the last but one layer is taken without its class token, and Llama; a clip of two frames, pooled to 9 tokens each."""
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    vision = {"model_type": "clip_vision_model", **_VISION, "image_size": 48}
    config = LlavaNextVideoConfig(
        vision_config=vision, text_config={"model_type": "llama", **_TEXT}, image_grid_pinpoints=[[48, 48]], **_TOKENS
    )
    model = seeded(lambda: LlavaNextVideoForConditionalGeneration(config))
    clip_pixels = torch.randn(1, 2, 3, 48, 48, generator=torch.Generator().manual_seed(4))
    return model, {**_ids([VIDEO] * (2 * 9)), "pixel_values_videos": clip_pixels}


def video_llava() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Two CLIP towers and Llama; a clip of two frames, every token of the last but one layer."""
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION}, text_config={"model_type": "llama", **_TEXT},
        image_token_index=IMAGE, video_token_index=VIDEO,
    )  # fmt: skip
    model = seeded(lambda: VideoLlavaForConditionalGeneration(config))
    clip_pixels = torch.randn(1, 2, 3, 56, 56, generator=torch.Generator().manual_seed(4))
    return model, {**_ids([VIDEO] * (2 * 50)), "pixel_values_videos": clip_pixels}


def internvl() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """InternVL's tower and Qwen2; two frames of 64 patches, a quarter of them behind pixel shuffle."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = {**_VISION, "image_size": [64, 64], "patch_size": [8, 8]}
    config = InternVLConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **_TEXT}, image_token_id=IMAGE, downsample_ratio=0.5
    )
    model = seeded(lambda: InternVLForConditionalGeneration(config))
    frames = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    return model, {**_ids([IMAGE] * (2 * 16)), "pixel_values": frames}


# ---- the contract ----------------------------------------------------------------------------------------------------------

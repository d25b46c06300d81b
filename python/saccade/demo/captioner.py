"""transformers' Qwen2.5-VL on a clip: the model, its inputs, a forward and a backward."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saccade.demo.errors import DemoError
from saccade.demo.patches import fit, patchify, resize
from saccade.demo.video import Clip
from saccade.swap import Recipe, Rule, plan

__all__ = ["ROTARY", "Inputs", "backward", "forward", "inputs_of", "load"]

ROTARY = Recipe((Rule("rotary"),), name="rotary")
"""What the demo puts into the captioner: rotary embeddings of vision and text."""

_MOST_TOKENS = 360  # of the video in the language model; four patches each
_BEFORE = "You write captions.\n"
_AFTER = "\nCaption: "
_CAPTION = "a round picture wanders over a cup of coffee, then a person smiles."
_SPECIAL = {"image_token_id": 256, "video_token_id": 257, "vision_start_token_id": 258, "vision_end_token_id": 259}


@dataclass(frozen=True)
class Inputs:
    """Tensors of one sample, and what they stand for."""

    ids: torch.Tensor
    """[1, S]"""
    pixels: torch.Tensor
    """fp32 [N, 1176]"""
    grid: torch.Tensor
    """[1, 3]: (T, h, w) of patches."""
    positions: torch.Tensor
    """[3, 1, S], the model's own M-RoPE unless replaced."""
    segments: tuple[Any, ...]
    """Text lengths and the (T, h, w) grid of video tokens, as `multimodal_positions` takes them."""
    seconds_per_step: float
    """Between two steps of T."""
    target: int
    """Where the caption begins."""
    tokens: str
    """Where the text tokens come from."""

    def at(self, positions: torch.Tensor) -> Inputs:
        """The same sample at other positions [3, S]."""
        return replace(self, positions=positions[:, None])


def _small() -> Any:
    """Qwen2.5-VL's structure at a size that a laptop runs: its head widths, GQA, M-RoPE sections, windows, patches."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            # Larger than in training, so that scores have a spread of about 2 and depend on the rotation.
            "initializer_range": 0.06,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 320,
            "intermediate_size": 640,
            "num_heads": 4,
            "out_hidden_size": 512,
            "fullatt_block_indexes": [2],
            "window_size": 112,
            "tokens_per_second": 2,
            "initializer_range": 0.06,
        },
        **_SPECIAL,
    )


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def load(folder: Path | None) -> Any:
    """The captioner in fp32: seeded random weights, or those of a folder; nothing is downloaded.

    Raises:
        DemoError: the folder holds no Qwen2.5-VL, or more than memory takes.
    """
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 19):
        raise DemoError(f"the demo needs transformers 5.19 or newer, {transformers.__version__} is installed")
    if folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.Qwen2_5_VLForConditionalGeneration(_small()).eval()
    else:
        model = _weights(folder).eval()
    refused = plan(model, ROTARY).skipped
    if refused:
        row = refused[0]
        raise DemoError(
            f"transformers {transformers.__version__}: Saccade does not know this model: {row.path} ({row.cls}): {row.reason}"
        )
    return model


def _weights(folder: Path) -> Any:
    """A model from local files, in fp32."""
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    if not (folder / "config.json").is_file():
        raise DemoError(f"--model: {folder} is not a folder with a config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DemoError(f"--model: {folder / 'config.json'} cannot be read ({str(error).splitlines()[0]})") from error
    if config.model_type != "qwen2_5_vl":
        raise DemoError(f"--model: expected the weights of a qwen2_5_vl, {folder} holds a {config.model_type}")
    # 24 bytes a parameter: value and gradient in fp32, then again in float64 for the comparison.
    stored = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    width = {"bfloat16": 2, "float16": 2}.get(str(getattr(config, "dtype", "")).removeprefix("torch."), 4)
    needed, free = stored // width * 24, _memory()
    if free is not None and needed > free:
        raise DemoError(
            f"--model: the check against float64 needs about {needed / 2**30:.0f} GiB of memory for {folder}, "
            f"{free / 2**30:.0f} GiB are free"
        )
    try:
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DemoError(f"--model: {folder} cannot be loaded ({str(error).splitlines()[0]})") from error


def _encoder(folder: Path | None) -> tuple[Any, str]:
    """A function from text to token ids, and its name: the model's tokenizer, or bytes."""
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return (lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]), "the model's tokenizer"
    return (lambda text: list(text.encode())), "bytes"


def inputs_of(model: Any, clip: Clip, folder: Path | None = None) -> Inputs:
    """Prompt, video and caption as the model takes them, at the positions that transformers gives them."""
    vision = model.config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    steps = -(-len(clip.frames) // vision.temporal_patch_size)
    height, width = clip.frames.shape[1:3]
    size = fit(height, width, unit=unit, most=max(4, _MOST_TOKENS // steps) * unit * unit)
    frames = resize(clip.frames, size)
    pixels, grid = patchify(
        frames, patch=vision.patch_size, merge=vision.spatial_merge_size, temporal=vision.temporal_patch_size
    )
    t, h, w = grid[0].tolist()
    merged = (t, h // vision.spatial_merge_size, w // vision.spatial_merge_size)
    encode, tokens = _encoder(folder)
    config = model.config
    before = [*encode(_BEFORE), config.vision_start_token_id]
    after = [config.vision_end_token_id, *encode(_AFTER)]
    caption = encode(_CAPTION)
    ids = [*before, *[config.video_token_id] * (merged[0] * merged[1] * merged[2]), *after, *caption]
    input_ids = torch.tensor([ids])
    seconds = clip.interval * vision.temporal_patch_size
    positions, _ = model.model.get_rope_index(
        input_ids,
        mm_token_type_ids=(input_ids == config.video_token_id).int() * 2,
        video_grid_thw=grid,
        second_per_grid_ts=torch.tensor([seconds]),
    )
    return Inputs(
        ids=input_ids,
        pixels=pixels,
        grid=grid,
        positions=positions,
        segments=(len(before), merged, len(after) + len(caption)),
        seconds_per_step=seconds,
        target=len(ids) - len(caption),
        tokens=tokens,
    )


def forward(model: Any, inputs: Inputs) -> torch.Tensor:
    """Logits [S, V] in the model's dtype."""
    out = model(
        input_ids=inputs.ids,
        pixel_values_videos=inputs.pixels.to(model.dtype),
        video_grid_thw=inputs.grid,
        position_ids=inputs.positions,
        use_cache=False,
    )
    logits: torch.Tensor = out.logits[0]
    return logits


def backward(model: Any, inputs: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of the caption's cross-entropy for every parameter, by name."""
    model.zero_grad(set_to_none=True)
    logits = forward(model, inputs)
    start = inputs.target
    loss = torch.nn.functional.cross_entropy(logits[start - 1 : -1], inputs.ids[0, start:])
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), gradients

"""What each process of `test_context_parallel` runs; imported by spawned processes, so it imports no test."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist

import saccade
from swap import models
from swap import models_ltx as ltx

RECIPES: dict[str, Any] = {
    "lossless": "lossless",
    "sparse": {
        "rules": [
            {"kernel": "rotary"},
            {"kernel": "sliding_tile", "role": "self", "params": {"tile": [1, 4, 4], "window": [3, 1, 1]}},
        ]
    },
}


def build(family: str) -> tuple[Any, dict[str, Any]]:
    """A model and its inputs, as a pipeline gives them; tokens and heads divide by two."""
    if family == "ltx":
        model, given = ltx.ltx(num_attention_heads=4, attention_head_dim=24, cross_attention_dim=96), ltx.ltx_inputs()
        given["encoder_hidden_states"] = torch.cat([given["encoder_hidden_states"], torch.ones(2, 1, 16)], 1)
        given["encoder_attention_mask"] = None  # diffusers shares the heads among ranks, but not those of the mask
        return model, {**given, "return_dict": False}
    model = models.wan(num_attention_heads=4, attention_head_dim=24)
    return model, {**models.wan_inputs(model, 4), "return_dict": False}


def parallelize(model: Any) -> None:
    """`enable_parallelism` as it is, told of two devices: it asks torch.accelerator for their number, which is 0 on a CPU."""
    from diffusers import ContextParallelConfig

    counted, torch.accelerator.device_count = torch.accelerator.device_count, lambda: 2
    try:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    finally:
        torch.accelerator.device_count = counted


def rank(index: int, folder: str, cases: list[tuple[str, str, str]]) -> None:
    """One of two processes. Of each case it leaves the output, and gradients summed over both as training would, in a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=2)
    try:
        for family, recipe, first in cases:
            model, given = build(family)
            if first == "swap":
                report = saccade.accelerate(model, RECIPES[recipe], strict=True)
            parallelize(model)
            if first == "parallel":
                report = saccade.accelerate(model, RECIPES[recipe])
            out, _ = models.run(model, given)
            grads: dict[str, torch.Tensor] = {}
            if family == "wan":  # stock cross-attention of LTX has no backward here: text and video differ in length
                _, grads = models.run(model, given, backward=True)
                for name in sorted(grads):
                    dist.all_reduce(grads[name])
            swapped = [row.path for row in report.swapped]
            torch.save((out, grads, list(report.notes), swapped), f"{folder}/{family}-{recipe}-{first}-{index}")
        dist.barrier()
    finally:
        dist.destroy_process_group()

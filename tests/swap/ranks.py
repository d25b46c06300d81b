"""What each process of `test_context_parallel` runs; imported by spawned processes, so it imports no test."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

import saccade
from swap import models
from swap import models_ltx as ltx

RECIPES: dict[str, Any] = {
    "stock": None,
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
        model, given = ltx.ltx(), ltx.ltx_inputs()
        given["encoder_hidden_states"] = torch.cat([given["encoder_hidden_states"], torch.ones(2, 1, 16)], 1)
        given["encoder_attention_mask"] = torch.ones(2, 8)
        return model, {**given, "return_dict": False}
    model = models.wan()
    return model, {**models.wan_inputs(model, 4), "return_dict": False}


def parallelize(model: Any, **degrees: Any) -> None:
    """`enable_parallelism` as it is, told of two devices: it asks torch.accelerator for their number, which is 0 on a CPU."""
    from diffusers import ContextParallelConfig

    counted, torch.accelerator.device_count = torch.accelerator.device_count, lambda: 2
    try:
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
    finally:
        torch.accelerator.device_count = counted


def rank(index: int, port: int, family: str, recipe: str, first: str, degrees: dict[str, Any], results: Any) -> None:
    """One of two processes: output, and gradients summed over both, as data-parallel training of the shards would."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=index, world_size=2)
    try:
        model, given = build(family)
        report = None
        if first == "swap" and RECIPES[recipe] is not None:
            report = saccade.accelerate(model, RECIPES[recipe], strict=True)
        parallelize(model, **degrees)
        if first == "parallel" and RECIPES[recipe] is not None:
            report = saccade.accelerate(model, RECIPES[recipe])
        out, _ = models.run(model, given)
        grads: dict[str, torch.Tensor] = {}
        if "ulysses_degree" in degrees:
            _, grads = models.run(model, given, backward=True)
            for name in sorted(grads):
                dist.all_reduce(grads[name])
        notes = [] if report is None else list(report.notes)
        swapped = [] if report is None else [row.path for row in report.swapped]
        results.put((index, out.numpy(), {k: v.numpy() for k, v in grads.items()}, notes, swapped))
        dist.barrier()
    finally:
        dist.destroy_process_group()

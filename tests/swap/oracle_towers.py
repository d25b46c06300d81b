"""Vision towers that merge tokens, one image at a time and in plain torch: shares no code with the package."""

from __future__ import annotations

import itertools
import math

import torch
from merge.tome_oracle import Oracle


def attention(module, x, size):
    """One sample [N, D], eager softmax, log(size) of each key added to its scores; and the keys, mean over heads."""
    intern = hasattr(module, "projection_layer")
    q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    if intern:
        q, k = module.q_norm(q), module.k_norm(k)
    q, k, v = (t.view(x.shape[0], module.num_heads, module.head_dim) for t in (q, k, v))
    out = []
    for h in range(module.num_heads):
        scores = q[:, h] @ k[:, h].T / math.sqrt(module.head_dim) + size.log()[None]
        out.append(scores.softmax(-1) @ v[:, h])
    out = torch.cat(out, -1)
    return (module.projection_layer if intern else module.out_proj)(out), k.mean(1)


def oracle(model, image, amounts, prefix, proportional=True):
    """Behind each layer the tokens [N, D] of one image, each with the row that it went into."""
    x = model.embeddings(image[None])
    x = (model.pre_layrnorm(x) if hasattr(model, "pre_layrnorm") else x)[0]
    size = torch.ones(x.shape[0], dtype=x.dtype)
    place = list(range(x.shape[0]))
    states = [x]
    layers = model.encoder.layers if hasattr(model.encoder, "layers") else model.encoder.layer
    for layer, r in zip(layers, amounts, strict=True):
        intern = hasattr(layer, "lambda_1")
        first, second = (
            (layer.layernorm_before, layer.layernorm_after) if intern else (layer.layer_norm1, layer.layer_norm2)
        )
        weights = size if proportional else torch.ones_like(size)
        a, keys = attention(layer.attention if intern else layer.self_attn, first(x), weights)
        x = x + (layer.lambda_1 * a if intern else a)
        if r:
            n = x.shape[0]
            plan = Oracle(keys, r, range(0, n, 2), range(1, n, 2), set(range(prefix)))
            order = sorted(range(n - r), key=plan.heads.__getitem__)  # rows lie as their tokens did
            x, size = (t[order].to(x.dtype) for t in plan.merge(x, size))
            place = [order.index(plan.row_of[p]) for p in place]
        y = layer.mlp(second(x))
        x = x + (layer.lambda_2 * y if intern else y)
        states.append(x[place])
    last = x[place]
    return states, last if not hasattr(model, "post_layernorm") or prefix else model.post_layernorm(last)


def decreasing(tokens, keep, layers):
    """Tokens merged by layer: in all round(tokens * (1 - keep)), by the square of what is left of the tower."""
    total = round(tokens * (1 - keep))
    reached = [round(total * (1 - ((layers - i) / layers) ** 2)) for i in range(layers + 1)]
    return [b - a for a, b in itertools.pairwise(reached)]

"""ToMe in timm's ViTs as its paper says, one image at a time in float64, and the variants of the model that are tested."""

from __future__ import annotations

import math

import torch
from merge.tome_oracle import Oracle


def attend(attn, x, size):
    """One sample [N, D] with eager softmax in float64, and its keys, mean over heads."""
    n, _ = x.shape
    qkv = attn.qkv(x).view(n, 3, attn.num_heads, attn.head_dim)
    q, k, v = (attn.q_norm(qkv[:, 0]), attn.k_norm(qkv[:, 1]), qkv[:, 2])
    out = []
    for h in range(attn.num_heads):
        scores = q[:, h] @ k[:, h].T / math.sqrt(attn.head_dim) + size.log()[None]
        out.append(scores.softmax(-1) @ v[:, h])
    y = attn.norm(torch.cat(out, -1))
    y = y if attn.gate is None else y * attn.gate(x).sigmoid()
    return attn.proj(y), k.mean(1)


def expected(model, image, r, proportional=True):
    """Features [M, D] before the last norm, and sizes [M], of one image, merged as ToMe's paper says."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    prefix = model.num_prefix_tokens
    size = torch.ones(x.shape[0], dtype=torch.float64)
    for block, amount in zip(model.blocks, r, strict=True):
        a, keys = attend(block.attn, block.norm1(x), size if proportional else torch.ones_like(size))
        x = x + block.ls1(a)
        n = x.shape[0]
        amount = min(amount, (n - prefix) // 2)
        if amount:
            plan = Oracle(keys, amount, range(0, n, 2), range(1, n, 2), set(range(prefix)))
            order = sorted(range(len(plan.heads)), key=lambda i: plan.heads[i])  # as the tokens lay
            x, size = (t[order] for t in plan.merge(x, size))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, size


def oracle_logits(model, image, r, proportional=True):
    x, size = expected(model, image, r, proportional)
    x = model.norm(x)
    pool, patches = model.global_pool, slice(model.num_prefix_tokens, None)
    if hasattr(model, "head_dist"):
        return (model.head(x[0]) + model.head_dist(x[1])) / 2
    if pool == "token":
        x = x[0]
    elif pool == "map":  # as if each row stood there as often as it has tokens
        rows = x[patches].repeat_interleave(size[patches].long(), 0)
        x = model.attn_pool(rows[None])[0] if proportional else model.attn_pool(x[None, patches])[0]
    elif pool in ("avg", "avgmax"):
        mean = (x[patches] * size[patches, None]).sum(0) / size[patches].sum()
        x = mean if pool == "avg" else (mean + x[patches].amax(0)) / 2
    return model.head(model.fc_norm(x))


VARIANTS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"init_values": 0.3},
    "registers": {"reg_tokens": 4},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 1},
    "average": {"global_pool": "avg"},
    "average_no_class": {"global_pool": "avg", "class_token": False},
    "average_norm_first": {"global_pool": "avg", "fc_norm": False, "class_token": False},
    "average_and_max": {"global_pool": "avgmax"},
    "map": {"global_pool": "map", "class_token": False},
    "pre_norm": {"pre_norm": True},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
}


def attributes(model):
    return [(name, id(m), [(k, id(v)) for k, v in vars(m).items()]) for name, m in model.named_modules()]

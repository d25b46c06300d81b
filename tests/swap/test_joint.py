"""What holds for every family of joint attention; what is special to one is in its own file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("diffusers")

from saccade.swap.diffusers import cogvideox, hunyuan_video, hunyuan_video15, mochi
from saccade.swap.tokens import Tokens
from swap import models
from swap import models_joint as joint


@dataclass(frozen=True)
class Family:
    """One family: its small model and call, and what is counted there.

    Args:
        sites: that a lossless recipe swaps.
        stock: attention over text alone.
        blocks: that recompute under gradient checkpointing.
        kinds: lists of blocks, of each of which one is compiled.
    """

    adapter: ModuleType
    make: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    tokens: Tokens
    sites: int
    stock: frozenset[str]
    blocks: int
    sources: tuple[str, ...]
    kinds: tuple[str, ...] = ("transformer_blocks",)


REFINER = frozenset({"context_embedder.token_refiner.refiner_blocks.0.attn"})
FAMILIES = {
    "hunyuan_video": Family(
        hunyuan_video, joint.hunyuan_video, joint.hunyuan_video_inputs, Tokens((3, 8, 10), suffix=12), 5, REFINER, 4,
        ("HunyuanVideoAttnProcessor2_0.__call__", "Attention.forward", "HunyuanVideoRotaryPosEmbed.forward"),
        ("transformer_blocks", "single_transformer_blocks"),
    ),
    "hunyuan_video15": Family(
        hunyuan_video15, joint.hunyuan_video15, joint.hunyuan_video15_inputs, Tokens((3, 8, 10), suffix=20), 3, REFINER, 2,
        ("HunyuanVideo15AttnProcessor2_0.__call__", "Attention.forward", "HunyuanVideo15RotaryPosEmbed.forward"),
    ),
    "cogvideox": Family(
        cogvideox, joint.cogvideox, joint.cogvideox_inputs, Tokens((4, 8, 10), prefix=7), 4, frozenset(), 3,
        ("CogVideoXAttnProcessor2_0.__call__", "Attention.forward"),
    ),
    "mochi": Family(
        mochi, joint.mochi, joint.mochi_inputs, Tokens((3, 8, 10), suffix=12), 4, frozenset({"time_embed.pooler"}), 3,
        ("MochiAttnProcessor2_0.__call__", "MochiAttention.forward", "MochiRoPE.forward", "MochiRoPE._centers"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(name) -> Family:
    return FAMILIES[name]


@pytest.fixture(scope="module")
def model(family) -> Any:
    return family.make()


def test_lossless(family, model):
    models.check_lossless(model, family.inputs(model), expect=family.sites)


def test_restore(name, family, model):
    for recipe in ("lossless", f"{name}-aggressive"):
        models.check_restore(model, family.inputs(model), recipe)


def test_every_attention_is_reported(family, model):
    joint.check_sites(model, set(family.stock))


def test_changed_source(family, model, monkeypatch):
    joint.check_changed_source(model, family.adapter, family.sources, monkeypatch)


def test_stock_rule(family, model):
    joint.check_stock_rule(model, family.inputs(model))


def test_dense_by_torch(family, model, monkeypatch):
    joint.check_dense_by_torch(model, family.inputs(model), monkeypatch)


def test_sparse(family, model, monkeypatch):
    joint.check_sparse(model, family.inputs(model), family.tokens, monkeypatch)


def test_copies_have_their_own(family, model):
    joint.check_copies(model, family.inputs(model))


def test_compiled(family, model):
    for kind in family.kinds:
        joint.check_compiled(model, getattr(model, kind)[0], family.inputs(model))


def test_gradient_checkpointing(family, model):
    joint.check_checkpointing(model, family.blocks, family.inputs(model))


def test_lora(family, model):
    joint.check_lora(model, family.inputs(model))

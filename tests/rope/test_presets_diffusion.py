"""Presets of video and image generators against the functions and classes of diffusers, end to end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rope.angle_tables import assert_within, columns, table, table_bound, turn, turn_bound

from saccade.reference.apply_rope import apply_rope_learned
from saccade.rope import positions as place
from saccade.rope import presets

pytest.importorskip("diffusers")


class _CapturedError(Exception):
    """Carries q and k out of an attention processor."""


def _compare(name, spec, positions, cos, sin, rotated, x, base, heads=True, **roundings):
    """cos, sin [G, S, R] and rotated [B, H, S, D] of a peer against ours."""
    bound = table_bound(spec, positions, base=base, **roundings)
    ours = table(spec, positions)
    for ours_part, theirs, part in zip(ours, (cos, sin), ("cos", "sin"), strict=True):
        assert_within(ours_part, theirs, bound, f"{name} {part}")
    assert_within(turn(x, positions, spec), rotated, turn_bound(x, bound, spec), f"{name} rotated")


def _from_columns(values, spec):
    """[S, D] of columns to [1, S, R]; both columns of a pair must agree."""
    values = values.reshape(-1, values.shape[-1])
    pairs = values[:, 0::2] if spec.pairing == "interleaved" else values[:, : spec.pairs]
    assert torch.equal(columns(pairs, spec), values)
    return pairs[None]


@pytest.mark.parametrize("grid", [(3, 4, 5), (1, 1, 1), (21, 3, 2)])
def test_wan(monkeypatch, grid):
    from diffusers.models.transformers import transformer_wan as peer

    t, h, w = grid
    cos, sin = peer.WanRotaryPosEmbed(128, (1, 2, 2), 1024)(torch.empty(1, 16, t, 2 * h, 2 * w))
    x = torch.randn(1, t * h * w, 2 * 128)

    def capture(query, key, *args, **kwargs):
        raise _CapturedError(query, key)

    monkeypatch.setattr(peer, "dispatch_attention_fn", capture)
    same = torch.nn.Identity()
    attention = SimpleNamespace(
        heads=2, add_k_proj=None, norm_q=same, norm_k=same, to_q=same, to_k=same, to_v=same, fused_projections=False
    )
    attention.is_cross_attention = False
    with pytest.raises(_CapturedError) as caught:
        peer.WanAttnProcessor()(attention, x, None, None, (cos, sin))
    rotated = caught.value.args[0].transpose(1, 2)
    spec, positions = presets.wan(128), place.grid_positions(grid)
    x = x.unflatten(2, (2, 128)).transpose(1, 2)
    _compare("wan", spec, positions, _from_columns(cos, spec), _from_columns(sin, spec), rotated, x, None)


@pytest.mark.parametrize("head_dim", [128, 96, 80, 64])
def test_wan_sizes(head_dim):
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    cos, _ = WanRotaryPosEmbed(head_dim, (1, 1, 1), 64)(torch.empty(1, 1, 2, 3, 60))
    spec, positions = presets.wan(head_dim), place.grid_positions((2, 3, 60))
    assert_within(table(spec, positions)[0], _from_columns(cos, spec), table_bound(spec, positions, base=None))


def test_hunyuan_video_with_text_behind():
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed

    cos, sin = HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56])(torch.empty(1, 16, 3, 8, 10))
    x = torch.randn(2, 3, 3 * 4 * 5 + 7, 128)
    rotated = torch.cat((apply_rotary_emb(x[:, :, :-7], (cos, sin)), x[:, :, -7:]), 2)
    spec, positions = presets.hunyuan_video(), place.grid_positions((3, 4, 5))
    bound = table_bound(spec, positions, base=256.0)
    for ours, theirs in zip(table(spec, positions), (cos, sin), strict=True):
        assert_within(ours, _from_columns(theirs, spec), bound, "hunyuan_video")
    positions = place.grid_positions((3, 4, 5), suffix=7)
    bound = table_bound(spec, positions, base=256.0)
    ours = turn(x, positions, spec)
    assert_within(ours, rotated, turn_bound(x, bound, spec), "hunyuan_video rotated")
    assert torch.equal(ours[:, :, -7:], x[:, :, -7:].double())


@pytest.mark.parametrize(("grid", "base"), [((5, 30, 45), (30, 45)), ((3, 30, 30), (30, 45)), ((2, 48, 20), (30, 45))])
def test_cogvideox_crop(grid, base):
    from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    t, h, w = grid
    crop = get_resize_crop_region_for_grid((h, w), base[1], base[0])
    assert place.cogvideox_crop((h, w), base) == crop
    cos, sin = get_3d_rotary_pos_embed(64, crop, (h, w), t)
    x = torch.randn(1, 2, t * h * w, 64)
    spec, positions = presets.cogvideox(64), place.cogvideox_positions(grid, crop=crop)
    rotated = apply_rotary_emb(x, (cos, sin))
    # linspace in float32: end point, step, product and sum, each rounded at the size of the largest coordinate.
    _compare(
        "cogvideox",
        spec,
        positions,
        _from_columns(cos, spec),
        _from_columns(sin, spec),
        rotated,
        x,
        1e4,
        position_roundings=4,
        reach=float(max(base)),
    )


def test_cogvideox_slice_with_text_in_front():
    from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed

    cos, sin = get_3d_rotary_pos_embed(64, None, (6, 7), 5, grid_type="slice", max_size=(30, 45))
    x = torch.randn(1, 2, 4 + 210, 64)
    rotated = torch.cat((x[:, :, :4], apply_rotary_emb(x[:, :, 4:], (cos, sin))), 2)
    spec, positions = presets.cogvideox(64), place.cogvideox_positions((5, 6, 7), prefix=4)
    bound = table_bound(spec, positions, base=1e4)
    assert_within(turn(x, positions, spec), rotated, turn_bound(x, bound, spec), "cogvideox 1.5")


@pytest.mark.parametrize("fps", [None, 24, 30, 16])
def test_cosmos(fps):
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_cosmos import CosmosRotaryPosEmbed

    cos, sin = CosmosRotaryPosEmbed(128, (16, 24, 24), (1, 2, 2), 24, (2.0, 1.0, 1.5))(
        torch.empty(1, 16, 9, 8, 10), fps
    )
    x = torch.randn(1, 2, 9 * 4 * 5, 128)
    spec, positions = presets.cosmos(128, scale=(2.0, 1.0, 1.5)), place.cosmos_positions((9, 4, 5), fps=fps)
    rotated = apply_rotary_emb(x, (cos, sin), use_real_unbind_dim=-2)
    cos, sin = _from_columns(cos, spec), _from_columns(sin, spec)
    _compare("cosmos", spec, positions, cos, sin, rotated, x, 1e4 * 2.2, position_roundings=2)


@pytest.mark.parametrize(("head_dim", "heads"), [(64, 32), (40, 2), (32, 3)])
def test_ltx(head_dim, heads):
    from diffusers.models.transformers import transformer_ltx as peer

    width, grid, scale = heads * head_dim, (5, 4, 6), (8 / 25, 32, 32)
    rope = peer.LTXVideoRotaryPosEmbed(width, 20, 2048, 2048)
    x = torch.randn(2, 120, width)
    cos, sin = rope(x, *grid, rope_interpolation_scale=scale)
    rotated = peer.apply_rotary_emb(x, (cos, sin)).unflatten(2, (heads, head_dim)).transpose(1, 2)
    spec = presets.ltx(head_dim, heads)
    positions = place.ltx_positions(grid, scale=scale)
    cos, sin = (v[0, :, 0::2].unflatten(1, (heads, -1)).transpose(0, 1) for v in (cos, sin))
    x = x.unflatten(2, (heads, head_dim)).transpose(1, 2)
    # The exponent comes from linspace (twice as much), the coordinate from three products, doubled, and one difference.
    _compare("ltx", spec, positions, cos, sin, rotated, x, 1e8, position_roundings=8, reach=1.0)


def test_ltx_from_coordinates():
    from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed

    coordinates = torch.stack((torch.arange(6) * 0.32, torch.arange(6) * 32.0, torch.arange(6) * 64.0))
    cos, _ = LTXVideoRotaryPosEmbed(128)(torch.empty(1, 6, 128), video_coords=coordinates[None])
    spec, positions = presets.ltx(64, 2), place.normalise_positions(coordinates, (20, 2048, 2048))
    theirs = cos[0, :, 0::2].unflatten(1, (2, -1)).transpose(0, 1)
    bound = table_bound(spec, positions, base=1e8, position_roundings=6, reach=1.0)
    assert_within(table(spec, positions)[0], theirs, bound, "ltx coordinates")


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize(("head_dim", "heads"), [(128, 32), (40, 2)])
def test_ltx2_video(layout, head_dim, heads):
    from diffusers.models.transformers import transformer_ltx2 as peer

    width, grid = heads * head_dim, (4, 3, 5)
    rope = peer.LTX2AudioVideoRotaryPosEmbed(width, rope_type=layout, num_attention_heads=heads)
    cos, sin = rope(rope.prepare_video_coords(1, *grid, device=torch.device("cpu"), fps=25.0))
    x = torch.randn(1, 60, width)
    apply = peer.apply_split_rotary_emb if layout == "split" else peer.apply_interleaved_rotary_emb
    rotated = apply(x, (cos, sin)).unflatten(2, (heads, head_dim)).transpose(1, 2)
    spec, positions = presets.ltx2(head_dim, heads, layout=layout), place.ltx2_positions(grid, fps=25)
    if layout == "split":
        cos, sin = cos[0], sin[0]
    else:
        cos, sin = (v[0, :, 0::2].unflatten(1, (heads, -1)).transpose(0, 1) for v in (cos, sin))
    x = x.unflatten(2, (heads, head_dim)).transpose(1, 2)
    # Coordinates: fps, middle, base and the difference, doubled.
    _compare(f"ltx2 {layout}", spec, positions, cos, sin, rotated, x, 1e4, position_roundings=8, reach=1.0)


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("shift", [0, 3])
def test_ltx2_audio(layout, shift):
    from diffusers.models.transformers import transformer_ltx2 as peer

    rope = peer.LTX2AudioVideoRotaryPosEmbed(
        96, rope_type=layout, num_attention_heads=3, modality="audio", scale_factors=[4]
    )
    cos, sin = rope(rope.prepare_audio_coords(1, 11, torch.device("cpu"), shift))
    spec = presets.ltx2(32, 3, axes=1, layout=layout)
    positions = place.ltx2_audio_positions(11, shift=shift)
    if layout == "split":
        cos, sin = cos[0], sin[0]
    else:
        cos, sin = (v[0, :, 0::2].unflatten(1, (3, -1)).transpose(0, 1) for v in (cos, sin))
    bound = table_bound(spec, positions, base=1e4, position_roundings=8, reach=1.0)
    for ours, theirs in zip(table(spec, positions), (cos, sin), strict=True):
        assert_within(ours, theirs, bound, f"ltx2 audio {layout}")


def test_mochi(monkeypatch):
    from diffusers.models import attention_processor as processors
    from diffusers.models.transformers.transformer_mochi import MochiRoPE

    heads, head_dim, grid = 2, 32, (3, 4, 5)
    frequencies = torch.randn(3, heads, head_dim // 2) * 0.3
    cos, sin = MochiRoPE()(frequencies, *grid, torch.device("cpu"), torch.float32)
    x, text = torch.randn(1, 60, heads * head_dim), torch.zeros(1, 2, heads * head_dim)

    def capture(query, key, *args, **kwargs):
        raise _CapturedError(query, key)

    monkeypatch.setattr(processors.F, "scaled_dot_product_attention", capture)
    same = torch.nn.Identity()
    layers = ("to_{}", "add_{}_proj", "norm_{}", "norm_added_{}")
    names = [layer.format(part) for layer in layers for part in "qkv"]
    attention = SimpleNamespace(heads=heads, **dict.fromkeys(names, same))
    with pytest.raises(_CapturedError) as caught:
        processors.MochiAttnProcessor2_0()(attention, x, text, torch.ones(1, 2), (cos, sin))
    rotated = caught.value.args[0][:, :, :60]
    spec, positions = presets.mochi(frequencies), place.mochi_positions(grid)
    x = x.unflatten(2, (heads, head_dim)).transpose(1, 2)
    # Edges of linspace (4), their middle (2), and a sum of three products (3, counted by the factor of the helper).
    reach = float(positions.abs().max())
    _compare(
        "mochi",
        spec,
        positions,
        cos.transpose(0, 1),
        sin.transpose(0, 1),
        rotated,
        x,
        2.0,
        position_roundings=6,
        reach=reach,
    )


def test_mochi_gradient_of_frequencies():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    frequencies = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    positions = place.mochi_positions((1, 2, 2), area=4)[:, None]
    assert presets.mochi(frequencies).inv_freq is frequencies

    def turned(x, frequencies):
        return apply_rope_learned(x, positions, presets.mochi(frequencies).dense_tensor(), interleaved=True)

    assert torch.autograd.gradcheck(turned, (x, frequencies))
    static = turn(x.detach(), positions, presets.mochi(frequencies.detach()))
    torch.testing.assert_close(turned(x, frequencies).detach(), static, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("widths", "theta"), [((16, 56, 56), 10000), ((32, 32, 32, 32), 2000)])
def test_flux(widths, theta):
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    image = FluxPipeline._prepare_latent_image_ids(1, 4, 6, torch.device("cpu"), torch.float32)
    ids = torch.cat((torch.zeros(5, 3), image))
    ids = torch.cat((ids, torch.zeros(29, len(widths) - 3)), 1)
    positions = place.flux_positions(5, (4, 6), axes=len(widths))
    assert torch.equal(positions.double(), ids.T.double())
    cos, sin = FluxPosEmbed(theta, list(widths))(ids)
    x = torch.randn(1, 2, 29, 128)
    rotated = apply_rotary_emb(x, (cos, sin))
    spec = presets.flux(widths, base=theta)
    _compare("flux", spec, positions, _from_columns(cos, spec), _from_columns(sin, spec), rotated, x, None)


def test_per_head_frequencies_follow_the_joint_width():
    spec = presets.ltx(64, 32)
    assert spec.groups == 32 and spec.inv_freq[0][0] == 0.0  # 2048 columns leave 2 over in threes of pairs
    assert spec.inv_freq[0][1] == pytest.approx(torch.pi / 2) and spec.inv_freq[31][31] == pytest.approx(
        1e4 * torch.pi / 2
    )
    assert presets.ltx2(64, 32).inv_freq == presets.ltx2(64, 32, layout="split").inv_freq == spec.inv_freq


def test_seedance_has_its_own_text_axis():
    spec = presets.seedance(128, sections=(32, 32, 32), text=16, base=1e4)
    assert (spec.axes, spec.rotary_dim, spec.axis.count(3)) == (4, 112, 8)
    assert place.seedance_positions([(2, 1, 1), 2, (1, 1, 1)]).tolist() == [
        [0, 1, 0, 0, 2],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0],
    ]


BAD = [
    (lambda: presets.wan(127), ValueError, "head_dim"),
    (lambda: presets.wan(128, base=1.0), ValueError, "base"),
    (lambda: presets.wan(128.0), TypeError, "head_dim"),
    (lambda: presets.hunyuan_video(80), ValueError, "head_dim"),
    (lambda: presets.hunyuan_video(128, sections=(16, 56, 55)), ValueError, "sections"),
    (lambda: presets.hunyuan_video(128, sections=(16, 56)), ValueError, "sections"),
    (lambda: presets.hunyuan_video(128, sections=(16, 56, 54)), ValueError, "head_dim 128"),
    (lambda: presets.cogvideox(72), ValueError, "head_dim"),
    (lambda: presets.cosmos(128, scale=(2.0, 1.0)), ValueError, "scale"),
    (lambda: presets.cosmos(128, scale=(0.0, 1.0, 1.0)), ValueError, r"scale\[0\]"),
    (lambda: presets.cosmos(10), ValueError, "head_dim"),
    (lambda: presets.ltx(64, 0), ValueError, "heads"),
    (lambda: presets.ltx(2, 1), ValueError, "head_dim"),
    (lambda: presets.ltx(64, 32, base=float("nan")), ValueError, "base"),
    (lambda: presets.ltx2(64, 32, layout="neox"), ValueError, "layout"),
    (lambda: presets.ltx2(64, 32, axes=0), ValueError, "axes"),
    (lambda: presets.mochi([[1.0]]), TypeError, "frequencies"),
    (lambda: presets.mochi(torch.zeros(2, 3, 4)), ValueError, "frequencies"),
    (lambda: presets.mochi(torch.full((3, 1, 2), float("nan"))), ValueError, "inv_freq"),
    (lambda: presets.flux(()), ValueError, "axes_dim"),
    (lambda: presets.flux((15, 57)), ValueError, "axes_dim"),
    (lambda: presets.flux("16"), TypeError, "axes_dim"),
    (lambda: presets.seedance(64, sections=(32, 32, 32), text=0, base=1e4), ValueError, "head_dim"),
    (lambda: presets.seedance(64, sections=(32, 32), text=0, base=1e4), ValueError, "sections"),
]


@pytest.mark.parametrize(("call", "error", "names"), BAD)
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names):
        call()

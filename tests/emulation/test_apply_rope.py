"""apply_rope on the emulated GPU: bit for bit the numpy twin, and inside the error budget of the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation.cases import BF16, F16, F32, Case, Outputs, bits, options, poisoned, problem
from emulation.cuda_emulator import call, rope_args
from emulation.twin import twin_cos_sin, twin_table

from saccade.reference.apply_rope import apply_rope, rotate
from saccade.testing.budget import check_budget

CASES = [
    Case("one_token_decode", shape=(2, 28, 4, 1, 128), base=32768),
    Case("many_tokens_two_batches", shape=(2, 2, 2, 63, 32), shared_positions=False),
    Case("position_zero", shape=(1, 2, 1, 3, 64), base=0),
    Case("tiles_of_32_tokens_and_a_rest", shape=(2, 1, 0, 161, 16), layout="bshd"),
    Case("tiles_of_8_tokens_and_a_rest", shape=(1, 4, 2, 35, 128), layout="bshd"),
    Case("gqa_bshd", shape=(1, 6, 2, 9, 128), layout="bshd"),
    Case("q_alone_f16", F16, shape=(1, 3, 0, 7, 64)),
    Case("wan_40_heads", shape=(1, 40, 40, 2, 128), axes=3, interleaved=True, layout="bshd"),
    Case("interleaved_f16", F16, shape=(1, 2, 2, 4, 96), interleaved=True, positions=torch.float32),
    Case("f32_half", F32, shape=(1, 2, 1, 6, 80), positions=torch.float64, shift=3),
    Case("f32_interleaved", F32, shape=(1, 2, 1, 6, 64), interleaved=True, positions=torch.int32),
    Case("head_72_half_8_bytes", shape=(1, 3, 3, 4, 72)),
    Case("head_72_interleaved", shape=(1, 3, 3, 4, 72), interleaved=True),
    Case("head_80", F16, shape=(1, 3, 1, 4, 80)),
    Case("head_256", shape=(1, 2, 1, 3, 256)),
    Case("head_512_f32", F32, shape=(1, 1, 1, 2, 512)),
    Case("partial_rotary", shape=(1, 2, 1, 5, 64), pairs=12, layout="bshd"),
    Case("partial_rotary_odd_pairs", shape=(1, 2, 1, 5, 40), pairs=7),
    Case("odd_head_dim_odd_pairs_interleaved", F32, shape=(1, 2, 1, 3, 19), pairs=9, interleaved=True),
    Case("odd_head_dim_f16_interleaved", F16, shape=(1, 2, 1, 3, 19), pairs=9, interleaved=True, scale=0.5),
    Case("unaligned_memory", shape=(1, 2, 2, 5, 64), layout="odd"),
    Case("unaligned_memory_interleaved", shape=(1, 2, 2, 5, 64), layout="odd", interleaved=True),
    Case("unaligned_memory_f32", F32, shape=(1, 2, 2, 5, 64), layout="odd"),
    Case("packed_rows", shape=(2, 2, 2, 5, 64), layout="packed"),
    Case("hope_copies_identity", shape=(1, 4, 2, 6, 128), axes=3, end=48, positions=torch.float32),
    Case("hope_in_place", shape=(1, 4, 2, 6, 128), axes=3, end=48, positions=torch.float32, inplace=True),
    Case("inner_range_half", shape=(1, 2, 2, 5, 64), begin=8, end=24),
    Case("inner_range_odd", shape=(1, 2, 2, 5, 64), begin=3, end=17),
    Case("inner_range_interleaved_in_place", shape=(1, 2, 2, 5, 64), begin=4, end=12, interleaved=True, inplace=True),
    Case("nothing_turns", shape=(1, 2, 2, 5, 64), begin=0, end=0),
    Case("nothing_turns_in_place", shape=(1, 2, 2, 5, 64), begin=0, end=0, inplace=True),
    Case("in_place_bshd_f16", F16, shape=(2, 4, 1, 5, 64), layout="bshd", inplace=True),
    Case("ltx_groups", shape=(1, 8, 8, 3, 64), groups=8, axes=3, interleaved=True, positions=torch.float64, shift=2),
    Case("groups_of_heads_gqa", shape=(1, 8, 4, 3, 32), groups=4, axes=2),
    Case("groups_in_many_blocks", shape=(1, 32, 32, 2, 128), groups=32, axes=2, interleaved=True, layout="bshd"),
    Case("mochi_dense_axes", shape=(1, 6, 6, 4, 64), groups=6, axes=3, dense=True, positions=torch.float32, shift=16),
    Case("inverse_scaled", shape=(1, 2, 2, 5, 64), inverse=True, scale=1.25),
    Case("position_2_31", F32, shape=(1, 2, 1, 5, 64), base=2**31),
    Case("negative_positions", F32, shape=(1, 2, 1, 5, 64), base=-70000, positions=torch.float32),
]


def run(
    case: Case, q: torch.Tensor, k: torch.Tensor | None, positions: torch.Tensor, steps: torch.Tensor
) -> list[torch.Tensor]:
    """Outputs for q and k."""
    outs = Outputs(case, q, k)
    call("apply_rope", "apply_rope", rope_args(*outs.launch_tensors(), positions, steps, **options(case, steps)))
    outs.check_surroundings()
    return outs.tensors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_same_bits_as_the_twin_and_inside_the_budget(case: Case) -> None:
    q, k, positions, steps = problem(case)
    outs = run(case, q, k, positions, steps)
    opts = options(case, steps)
    cosine, sine, turning = twin_table(
        positions,
        steps,
        case.shift,
        case.begin,
        int(opts["end"]),
        case.scale,
        case.inverse,  # type: ignore[call-overload]
    )
    for x, out in zip([t for t in (q, k) if t is not None], outs, strict=True):
        twin = rotate(x, cosine, sine, case.interleaved).to(x.dtype)
        columns = torch.arange(x.shape[-1])
        pair = columns // 2 if case.interleaved else columns % steps.shape[2]
        turned = (columns < 2 * steps.shape[2]) & turning[pair.clamp(max=steps.shape[2] - 1)]
        expected = torch.where(turned, twin, x)
        assert torch.equal(bits(out), bits(expected))
        common = dict(shift=case.shift, interleaved=case.interleaved, scale=case.scale, inverse=case.inverse)
        exact = apply_rope(x.double(), positions, steps, **common)  # type: ignore[arg-type]
        check_budget(case.id, out, apply_rope(x, positions, steps, **common), exact)  # type: ignore[arg-type]


def test_cos_sin_has_the_bits_of_the_twin() -> None:
    """Through the kernel: x = (1, 0) gives (cos, sin); a step of 2^32 and integer positions reach any 32-bit turn."""
    rng = np.random.default_rng(1)
    t = rng.integers(-(2**31), 2**31, 4096, dtype=np.int64)
    t[:12] = [0, 1, -1, 63, 64, 2**29, 2**29 - 1, -(2**29), 2**30, -(2**30), 2**31 - 1, -(2**31)]
    tokens = len(t) // 8
    x = torch.zeros(8, 1, tokens, 2)
    x[..., 0] = 1.0
    out, _ = poisoned(x)
    positions = torch.from_numpy(t).view(1, 8, tokens)
    steps = torch.full((1, 1, 1), 2**32)
    call("apply_rope", "apply_rope", rope_args(x, out, None, None, positions, steps))
    cosine, sine = (torch.from_numpy(v).view(8, tokens) for v in twin_cos_sin(t.astype(np.int32)))
    assert torch.equal(out[:, 0, :, 0], cosine * 1.0)
    assert torch.equal(out[:, 0, :, 1], sine + 0.0)
    angle = torch.from_numpy(t.astype(np.float64) * (2 * np.pi / 2**32)).view(8, tokens)
    assert (out[:, 0, :, 0].double() - angle.cos()).abs().max() < 8e-8
    assert (out[:, 0, :, 1].double() - angle.sin()).abs().max() < 8e-8


def test_positions_that_are_no_numbers_give_nan_to_their_token_alone() -> None:
    case = Case("nan", F32, shape=(1, 2, 1, 6, 64), axes=2, positions=torch.float32, end=24)
    q, k, positions, steps = problem(case)
    positions = positions.clone()
    positions[0, 0, 1], positions[1, 0, 3], positions[1, 0, 4] = float("nan"), float("inf"), 2.0**63
    for out in run(case, q, k, positions, steps):
        lost = out.isnan()
        assert lost[:, :, [1, 3, 4], :24].all() and lost[:, :, [1, 3, 4], 32:56].all()
        assert not lost[:, :, [0, 2, 5]].any() and not lost[..., 24:32].any() and not lost[..., 56:].any()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_identity_keeps_every_bit(dtype: torch.dtype, inplace: bool, interleaved: bool) -> None:
    """Infinities, NaN payloads and -0 of pairs outside [begin, end), and all but NaN where the sine is 0."""
    case = Case("identity", dtype, shape=(1, 2, 1, 4, 64), begin=8, end=24, interleaved=interleaved, inplace=inplace)
    q, k, positions, steps = problem(case)
    strange = torch.tensor([float("inf"), -float("inf"), -0.0, 0.0])
    for x in (q, k):
        assert x is not None
        x.copy_(strange.repeat(x.shape[-1] // 4).to(dtype).expand_as(x))
        columns = slice(0, 16) if interleaved else slice(0, 8)
        raw = x.view(torch.int16 if dtype == BF16 else torch.int32)
        raw[..., columns] = 0x7FA1 if dtype == BF16 else 0x7FA12345  # signalling NaN with a payload
    steps.zero_()
    for x, out in zip((q, k), run(case, q, k, positions, steps), strict=True):
        assert x is not None
        assert torch.equal(bits(out), bits(x))


def test_broadcast_inputs_are_read_through_zero_strides() -> None:
    case = Case("broadcast", shape=(2, 4, 2, 5, 64))
    q, k, positions, steps = problem(case)
    assert k is not None
    narrow_q, narrow_k = q[:1, :1].expand_as(q), k[:1, :, :1].expand_as(k)
    out_q, out_k = torch.full_like(q, float("nan")), torch.full_like(k, float("nan"))
    call("apply_rope", "apply_rope", rope_args(narrow_q, out_q, narrow_k, out_k, positions, steps))
    for x, out in ((narrow_q, out_q), (narrow_k, out_k)):
        exact = apply_rope(x.double(), positions, steps)
        check_budget("broadcast", out, apply_rope(x, positions, steps), exact)


@pytest.mark.parametrize("interleaved", [False, True])
def test_inverse_undoes_the_rotation(interleaved: bool) -> None:
    case = Case("forth", F32, shape=(1, 2, 0, 5, 64), interleaved=interleaved, base=1000)
    q, _, positions, steps = problem(case)
    (there,) = run(case, q, None, positions, steps)
    (back,) = run(
        Case("back", F32, shape=case.shape, interleaved=interleaved, inverse=True, base=1000),
        there,
        None,
        positions,
        steps,
    )
    assert (back - q).abs().max() < 4 * torch.finfo(F32).eps * q.abs().max()


def test_float64_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float32, float16 and bfloat16"):
        args = rope_args(
            x, x.clone(), None, None, torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.int64)
        )
        call("apply_rope", "apply_rope", args)


def test_offsets_beyond_2_31_elements() -> None:
    """Two batch entries 2^32 elements apart; the pages between are never touched, so they take no memory."""
    case = Case("far", shape=(2, 2, 1, 3, 32))
    q, k, positions, steps = problem(case)
    assert k is not None
    try:
        far = [torch.empty(2**32 + x[0].numel(), dtype=BF16) for x in (q, k)]
    except RuntimeError:
        pytest.skip("not run: 16 GB of address space are not to be had")
    views = [f.as_strided(x.shape, (2**32, *x.stride()[1:])) for f, x in zip(far, (q, k), strict=True)]
    for view, x in zip(views, (q, k), strict=True):
        view.copy_(x)
    call("apply_rope", "apply_rope", rope_args(views[0], views[0], views[1], views[1], positions, steps))
    for view, near in zip(views, run(case, q, k, positions, steps), strict=True):
        assert torch.equal(bits(view), bits(near))

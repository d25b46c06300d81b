"""qk_norm_rope and its gradient on the emulated GPU, inside the error budget of the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulation.cases import BF16, F16, F32, Case, Outputs, bits, options, poisoned, problem, tensor
from emulation.cuda_emulator import DTYPES, NormArgs, NormGradArgs, call, rope_args, strides, workspace

from saccade.reference.qk_norm_rope import qk_norm_rope
from saccade.testing.budget import check_budget

EPS = 1e-6
HEAD = [
    Case("one_token", shape=(1, 4, 1, 1, 128)),
    Case("qwen3_gqa", shape=(1, 8, 2, 3, 128), layout="bshd"),
    Case("hunyuan_interleaved", shape=(1, 3, 3, 4, 128), axes=3, interleaved=True, positions=torch.float32),
    Case("tokens_63_two_batches", shape=(2, 1, 1, 63, 32), shared_positions=False),
    Case("position_zero", shape=(1, 2, 1, 3, 64), base=0),
    Case("tiles_of_several_tokens", shape=(2, 1, 0, 50, 16)),
    Case("blocks_of_several_tiles", F32, shape=(3, 2, 1, 37, 24), shared_positions=False),
    Case("q_alone_f16", F16, shape=(1, 3, 0, 5, 64)),
    Case("f32", F32, shape=(1, 2, 1, 5, 64), positions=torch.float64),
    Case("f32_interleaved", F32, shape=(1, 2, 1, 5, 80), interleaved=True),
    Case("head_72_half_8_bytes", shape=(1, 3, 3, 4, 72)),
    Case("head_72_interleaved", shape=(1, 3, 3, 4, 72), interleaved=True),
    Case("head_96_f16", F16, shape=(1, 3, 1, 4, 96)),
    Case("head_256", shape=(1, 2, 1, 3, 256)),
    Case("head_512", shape=(1, 1, 1, 2, 512)),
    Case("head_512_f32_two_units_a_lane", F32, shape=(1, 1, 1, 2, 512)),
    Case("partial_rotary", shape=(1, 2, 1, 5, 64), pairs=12),
    Case("partial_rotary_33_units", shape=(1, 1, 1, 2, 512), pairs=1),
    Case("partial_rotary_65_units_f32", F32, shape=(1, 1, 1, 2, 511), pairs=3),
    Case("odd_everything", F32, shape=(1, 2, 1, 3, 19), pairs=7, interleaved=True),
    Case("identity_range", shape=(1, 2, 2, 4, 64), begin=5, end=17),
    Case("identity_range_interleaved", shape=(1, 2, 2, 4, 64), begin=5, end=17, interleaved=True),
    Case("unaligned_memory", shape=(1, 2, 2, 4, 64), layout="odd"),
    Case("groups", shape=(1, 8, 4, 3, 32), groups=4, axes=2),
    Case("many_groups", shape=(1, 24, 24, 2, 64), groups=24, interleaved=True),
    Case("scaled", shape=(1, 2, 1, 4, 64), scale=1.25),
]
ROW = [
    Case("ltx_per_head_angles", shape=(1, 6, 6, 3, 64), groups=6, axes=3, interleaved=True, positions=torch.float32),
    Case("wan_5120_columns", shape=(1, 40, 40, 2, 128), axes=3, interleaved=True, layout="bshd"),
    Case("one_token_gqa", shape=(1, 4, 2, 1, 64)),
    Case("bhsd_half_f16", F16, shape=(1, 3, 1, 5, 64)),
    Case("f32", F32, shape=(2, 3, 2, 3, 80)),
    Case("head_72_half", shape=(1, 3, 3, 2, 72)),
    Case("head_72_interleaved", shape=(1, 3, 3, 2, 72), interleaved=True),
    Case("partial_rotary", shape=(1, 3, 2, 3, 64), pairs=12),
    Case("unaligned_memory", shape=(1, 2, 2, 3, 64), layout="odd"),
    Case("long_row", F32, shape=(1, 11, 11, 2, 512)),
    Case("long_row_groups_in_turns", F32, shape=(1, 16, 16, 1, 384), groups=16),
    Case("wide_row_fits", F16, shape=(1, 8, 8, 1, 64), groups=8),
    Case("tokens_in_tiles", shape=(3, 1, 1, 37, 32)),
    Case("identity_range_scaled", shape=(1, 2, 2, 3, 64), begin=0, end=20, scale=1.0),
]
FORWARD = [(case, False) for case in HEAD] + [(case, True) for case in ROW]


def weights(case: Case, row: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    _, q_heads, k_heads, _, width = case.shape
    sizes = (q_heads * width, max(k_heads, 1) * width) if row else (width, width)
    q, k = (torch.empty(n).uniform_(0.5, 1.5, generator=g).to(dtype) for n in sizes)
    return q, k


def norm_args(rope, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, row: bool) -> NormArgs:
    given = q_weight if q_weight is not None else k_weight
    pointers = (None if w is None else w.data_ptr() for w in (q_weight, k_weight))
    return NormArgs(rope, *pointers, 0 if given is None else DTYPES[given.dtype], EPS, row)


def run(case: Case, row: bool, q, k, positions, steps, q_weight, k_weight) -> list[torch.Tensor]:
    outs = Outputs(case, q, k)
    rope = rope_args(*outs.launch_tensors(), positions, steps, **options(case, steps))
    call("qk_norm_rope", "qk_norm_rope", norm_args(rope, q_weight, k_weight, row))
    outs.check_surroundings()
    return outs.tensors


def reference(case: Case, row: bool, x, weight, positions, steps) -> torch.Tensor:
    return qk_norm_rope(
        x,
        weight,
        positions,
        steps,
        shift=case.shift,
        interleaved=case.interleaved,
        scale=case.scale,
        eps=EPS,
        row=row,
    )


def identifier(value: object) -> str:
    return value.id if isinstance(value, Case) else "row" if value else "head"


@pytest.mark.parametrize(("case", "row"), FORWARD, ids=identifier)
def test_forward_is_inside_the_budget(case: Case, row: bool) -> None:
    q, k, positions, steps = problem(case)
    w = weights(case, row, F32 if case.shape[1] % 2 else case.dtype)
    outs = run(case, row, q, k, positions, steps, *w)
    for name, x, out, weight in zip("qk", (q, k), outs, w, strict=False):
        assert x is not None
        exact = reference(case, row, x.double(), weight.double(), positions, steps)
        check_budget(f"{case.id} {name}", out, reference(case, row, x, weight, positions, steps), exact)


@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_without_weights_and_in_place(row: bool, inplace: bool) -> None:
    case = Case("plain", shape=(1, 4, 2, 4, 64), inplace=inplace, layout="bshd")
    q, k, positions, steps = problem(case)
    for x, out in zip((q, k), run(case, row, q, k, positions, steps, None, None), strict=True):
        assert x is not None
        exact = reference(case, row, x.double(), None, positions, steps)
        check_budget("plain", out, reference(case, row, x, None, positions, steps), exact)


@pytest.mark.parametrize("row", [False, True])
def test_same_bits_for_any_alignment_and_batch_split(row: bool) -> None:
    case = Case("aligned", F16, shape=(2, 4, 2, 5, 72), layout="packed", shared_positions=False)
    q, k, positions, steps = problem(case)
    w = weights(case, row, F16)
    aligned = run(case, row, q, k, positions, steps, *w)
    generator = torch.Generator().manual_seed(0)
    skewed = [tensor(*x.shape[:2], x.shape[2], x.shape[3], F16, "odd", generator).copy_(x) for x in (q, k)]
    for a, b in zip(aligned, run(case, row, *skewed, positions, steps, *w), strict=True):
        assert torch.equal(bits(a), bits(b))
    for n in range(2):
        alone = run(case, row, q[n : n + 1], k[n : n + 1], positions[:, n : n + 1], steps, *w)
        for a, b in zip(aligned, alone, strict=True):
            assert torch.equal(bits(a[n : n + 1]), bits(b))


def test_a_row_of_nan_or_infinity_stays_alone() -> None:
    case = Case("strange", F32, shape=(1, 2, 1, 4, 64))
    q, k, positions, steps = problem(case)
    q[0, 0, 1, 3], q[0, 1, 2, 5] = float("nan"), float("inf")
    out, _ = run(case, False, q, k, positions, steps, None, None)
    assert out[0, 0, 1].isnan().all() and not out[0, 1, 1].isnan().any()
    expected = reference(case, False, q, None, positions, steps)
    assert torch.equal(out.isnan(), expected.isnan())


# ---- gradient --------------------------------------------------------------------------------------------------------


def gradients(case: Case, row: bool, x, weight, dy, positions, steps, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, weight = x.to(dtype).requires_grad_(), weight.to(F32 if dtype != torch.float64 else dtype).requires_grad_()
    reference(case, row, x, weight, positions, steps).backward(dy.to(dtype))
    return x.grad, weight.grad


def run_backward(case: Case, row: bool, q, k, dq, dk, positions, steps, q_weight, k_weight) -> list[torch.Tensor]:
    """dx of q and k, then dweight of q and k."""
    outs = Outputs(replace(case, inplace=False), q, k)
    rope = rope_args(*outs.launch_tensors(), positions, steps, **options(case, steps))
    sums = [torch.full((w.numel(),), float("nan")) for w in (q_weight, k_weight)]
    args = NormGradArgs(norm_args(rope, q_weight, k_weight, row), dq.data_ptr(), None if dk is None else dk.data_ptr())
    args.q_dy_stride = strides(dq)
    args.q_dweight = sums[0].data_ptr()
    if dk is not None:
        args.k_dy_stride = strides(dk)
        args.k_dweight = sums[1].data_ptr()
    space = workspace("qk_norm_rope_bwd", "qk_norm_rope_bwd", args)
    args.workspace = space.data_ptr()
    call("qk_norm_rope_bwd", "qk_norm_rope_bwd", args)
    outs.check_surroundings()
    return [*outs.tensors, *sums[: len(outs.tensors)]]


@pytest.mark.parametrize(("case", "row"), FORWARD, ids=identifier)
def test_gradient_is_inside_the_budget(case: Case, row: bool) -> None:
    q, k, positions, steps = problem(case)
    w = weights(case, row, F32 if case.shape[1] % 2 else case.dtype)
    dys = problem(replace(case, seed=11))[:2]
    results = run_backward(case, row, q, k, *dys, positions, steps, *w)
    for i, (x, dy, weight) in enumerate(zip((q, k), dys, w, strict=True)):
        if x is None:
            continue
        exact = gradients(case, row, x, weight, dy, positions, steps, torch.float64)
        torch_grads = gradients(case, row, x, weight, dy, positions, steps, x.dtype)
        got = (results[i], results[i + (1 if k is None else 2)])
        for name, out, same, ref in zip(("dx", "dweight"), got, torch_grads, exact, strict=True):
            check_budget(f"{case.id} {'qk'[i]} {name}", out, same, ref, factor=3.0)


@pytest.mark.parametrize("row", [False, True])
def test_gradient_without_weights_leaves_the_workspace_alone(row: bool) -> None:
    case = Case("plain", shape=(1, 4, 2, 4, 64))
    q, k, positions, steps = problem(case)
    dq, dk = problem(replace(case, seed=3))[:2]
    outs = Outputs(case, q, k)
    rope = rope_args(*outs.launch_tensors(), positions, steps, **options(case, steps))
    args = NormGradArgs(norm_args(rope, None, None, row), dq.data_ptr(), dk.data_ptr())
    args.q_dy_stride, args.k_dy_stride = strides(dq), strides(dk)
    call("qk_norm_rope_bwd", "qk_norm_rope_bwd", args)
    for x, dy, out in zip((q, k), (dq, dk), outs.tensors, strict=True):
        ones = torch.ones(x.shape[1] * x.shape[3] if row else x.shape[3])
        exact, _ = gradients(case, row, x, ones, dy, positions, steps, torch.float64)
        same, _ = gradients(case, row, x, ones, dy, positions, steps, x.dtype)
        check_budget("plain", out, same, exact, factor=3.0)


def test_no_tokens_give_zero_weight_gradients() -> None:
    case = Case("empty", F32, shape=(1, 2, 1, 0, 16))
    q, k, positions, steps = (x if x is None else x.contiguous() for x in problem(case))
    w = weights(case, False, F32)
    rope = rope_args(q, q, k, k, positions, steps, **options(case, steps))
    args = NormGradArgs(norm_args(rope, *w, False))
    sums = [torch.full((16,), float("nan")) for _ in w]
    args.q_dweight, args.k_dweight = (s.data_ptr() for s in sums)
    assert workspace("qk_norm_rope_bwd", "qk_norm_rope_bwd", args).numel() == 0
    call("qk_norm_rope_bwd", "qk_norm_rope_bwd", args)
    assert all(torch.equal(s, torch.zeros(16)) for s in sums)


def test_poisoned_outputs_are_noticed() -> None:
    """The harness itself: an output that nothing wrote does not pass."""
    out, _ = poisoned(torch.zeros(1, 1, 2, 8, dtype=BF16))
    with pytest.raises(AssertionError, match="NaN"):
        check_budget("unwritten", out, torch.zeros_like(out), torch.zeros(out.shape, dtype=torch.float64))

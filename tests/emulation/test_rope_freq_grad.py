"""rope_freq_grad on the emulated GPU, inside the error budget of the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulation.cases import F16, F32, Case, problem
from emulation.cuda_emulator import FreqGradArgs, call, rope_args, strides, workspace

from saccade.reference.rope_freq_grad import rope_freq_grad
from saccade.testing.budget import check_budget

CASES = [
    Case("mochi", shape=(1, 6, 6, 20, 128), groups=6, axes=3, interleaved=True, positions=torch.float32, layout="bshd"),
    Case("one_group_gqa", shape=(2, 4, 2, 63, 64), positions=torch.float64, shared_positions=False),
    Case("rows_wrap_over_batches", shape=(40, 1, 1, 3, 32), positions=torch.int32, shared_positions=False),
    Case("five_axes_take_two_passes", F32, shape=(1, 2, 2, 9, 32), axes=5),
    Case("q_alone_f16", F16, shape=(1, 3, 0, 100, 64), positions=torch.float32),
    Case("f32_interleaved", F32, shape=(1, 2, 2, 30, 80), interleaved=True),
    Case("head_72_half_8_bytes", shape=(1, 2, 2, 30, 72)),
    Case("head_256", shape=(1, 1, 1, 10, 256)),
    Case("head_512_f32", F32, shape=(1, 1, 1, 5, 512)),
    Case("partial_rotary_odd_pairs", shape=(1, 2, 2, 20, 40), pairs=7),
    Case("partial_rotary_odd_pairs_interleaved", shape=(1, 2, 2, 20, 40), pairs=7, interleaved=True),
    Case("unaligned_memory", shape=(1, 2, 2, 20, 64), layout="odd"),
    Case("many_rows_a_block", shape=(1, 2, 0, 700, 16), groups=2, positions=torch.float32),
]


def run(case: Case, q, k, dq, dk, positions, pairs: int) -> torch.Tensor:
    rope = rope_args(q, q, k, k, positions, None, groups=case.groups, pairs=pairs, interleaved=case.interleaved)
    out = torch.full((case.axes, case.groups, pairs), float("nan"))
    args = FreqGradArgs(rope, dq.data_ptr(), None if dk is None else dk.data_ptr(), strides(dq))
    if dk is not None:
        args.k_dx_stride = strides(dk)
    args.out = out.data_ptr()
    space = workspace("rope_freq_grad", "rope_freq_grad", args)
    args.workspace = space.data_ptr()
    call("rope_freq_grad", "rope_freq_grad", args)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_inside_the_budget(case: Case) -> None:
    q, k, positions, steps = problem(case)
    dq, dk = problem(replace(case, seed=5))[:2]
    pairs = steps.shape[2]
    out = run(case, q, k, dq, dk, positions, pairs)
    tensors = [(x, d) for x, d in ((q, dq), (k, dk)) if x is not None and d is not None]
    common = dict(groups=case.groups, pairs=pairs, interleaved=case.interleaved)
    same = rope_freq_grad(tensors, positions, **common)
    exact = rope_freq_grad([(x.double(), d.double()) for x, d in tensors], positions, **common)
    check_budget(case.id, out, same, exact, factor=3.0)


def test_no_tokens_give_zeros() -> None:
    case = Case("empty", F32, shape=(1, 2, 1, 0, 16), axes=2)
    q, k, positions, _ = (x if x is None else x.contiguous() for x in problem(case))
    assert torch.equal(run(case, q, k, q, k, positions, 8), torch.zeros(2, 1, 8))

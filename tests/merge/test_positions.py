"""merge_positions: where merged rows stand."""

from __future__ import annotations

import pytest
import torch
from merge.merge_cases import generator, signs

import saccade
from saccade import merge as M


def brute(plan, b, place, how):
    """Positions of the rows of sample b, for a list of positions."""
    out = []
    for m, h in enumerate(plan.head[b].tolist()):
        own = [n for n, i in enumerate(plan.inverse[b].tolist()) if i == m]
        if h < 0:
            out.append(place[0])
        else:
            out.append(
                {"destination": place[h], "first": place[own[0]], "mean": sum(place[n] for n in own) / len(own)}[how]
            )
    return out


@pytest.mark.parametrize("how", ["destination", "first", "mean"])
@pytest.mark.parametrize("order", ["position", "split"])
def test_equals_brute_force(every, how, order):
    impl, device = every
    x = signs((3, 17, 4), device=device, distinct=4)
    for plan in (
        M.match(x, 7, order=order, impl=impl),
        M.match(x, 7, order=order, share_batch=True, impl=impl),
        M.match(x, threshold=0.9, order=order, impl=impl),
    ):
        for dtype in (torch.int64, torch.int32, torch.float32, torch.float64):
            place = torch.randint(-99, 99, (2, 3, 17), generator=generator(1)).to(device, dtype)
            out = M.merge_positions(plan, place, how=how)
            assert out.shape == (2, 3, plan.rows)
            assert out.dtype == (dtype if how != "mean" else torch.float32 if dtype == torch.float32 else torch.float64)
            for axis in range(2):
                for b in range(3):
                    want = brute(plan, b % plan.batch, place[axis, b].tolist(), how)
                    torch.testing.assert_close(out[axis, b].double().cpu(), torch.tensor(want, dtype=torch.float64))


def test_shapes():
    one, many = M.match(signs((1, 10, 16)), 3), M.match(signs((4, 10, 16)), 3)
    for how in ("destination", "first", "mean"):
        assert M.merge_positions(one, torch.arange(10), how=how).shape == (7,)
        assert M.merge_positions(one, torch.zeros(3, 10), how=how).shape == (3, 7)
        assert M.merge_positions(one, torch.zeros(3, 1, 10), how=how).shape == (3, 1, 7)
        assert M.merge_positions(one, torch.zeros(3, 5, 10), how=how).shape == (3, 5, 7)
        assert M.merge_positions(many, torch.arange(10), how=how).shape == (1, 4, 7)
        assert M.merge_positions(many, torch.zeros(3, 10), how=how).shape == (3, 4, 7)
        empty = M.match(torch.zeros(1, 0, 4), 0)
        assert M.merge_positions(empty, torch.zeros(3, 0), how=how).shape == (3, 0)


def test_position_order_keeps_positions_ascending():
    """Rows in the order of their destinations: causal masks and rotary embeddings keep their meaning."""
    plan = M.match(signs((2, 40, 16)), 15)
    place = M.merge_positions(plan, torch.arange(40))
    assert (place.diff(dim=-1) > 0).all()


def test_means_stay_exact_far_out():
    """By running sums, yet a mean late in a long sequence is as good as one at its start."""
    tokens = 50_000
    plan = M.build_plan(
        torch.zeros(1, tokens), torch.where(torch.arange(tokens) % 2 == 0, torch.arange(tokens) + 1, -1)[None]
    )
    place = torch.arange(tokens, dtype=torch.float64) + 1e9 + 0.25
    mean = M.merge_positions(plan.compact(), place, how="mean")
    want = place.view(-1, 2).mean(1)
    assert (mean - want).abs().max() < 1e-5


def test_serves_apply_rope():
    spec = saccade.rope.mrope(32, base=1e4, sections=(4, 6, 6))
    place = saccade.rope.grid_positions((2, 3, 4))
    plan = M.match(signs((2, 24, 16)), 6)
    for how in ("destination", "mean"):
        merged = M.merge_positions(plan, place, how=how)
        q, _ = saccade.rope.apply_rope(torch.randn(2, 3, 18, 32), None, merged, spec)
        assert q.shape == (2, 3, 18, 32)

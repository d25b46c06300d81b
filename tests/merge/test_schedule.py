"""Schedules: ToMe's own numbers, the clamp, and a budget that is met with the least merging."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.merge import MergeSchedule
from saccade.merge.schedule import block_flops


def test_constant_and_its_clamp():
    schedule = MergeSchedule.constant(8, 12, protected=1)
    assert schedule.tokens(197) == tuple(197 - 8 * i for i in range(1, 13))
    large = MergeSchedule.constant(8, 24, protected=1)
    assert large.tokens(197)[-3:] == (21, 13, 7)  # the last layer may merge (13 - 1) // 2 = 6
    assert large.r(23, 13) == 6 and large.r(0, 1) == 0 and large.r(0, 0) == 0


def test_shares_are_of_what_is_there():
    assert MergeSchedule.constant(0.5, 4).tokens(17) == (9, 5, 3, 2)
    assert MergeSchedule.constant(0.9, 1).tokens(10) == (5,)  # cut to a half


@pytest.mark.parametrize(
    ("r", "inflect", "layers", "expected"),
    [
        (8, 0, 4, (8, 8, 8, 8)),
        (8, 1, 5, (0, 4, 8, 12, 16)),
        (8, -1, 5, (16, 12, 8, 4, 0)),
        (5, 0.5, 3, (2, 5, 8)),
        (7, 1, 1, (7,)),
        (16, 1, 12, (0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32)),
    ],
)
def test_linear(r, inflect, layers, expected):
    assert MergeSchedule.linear(r, inflect, layers).amounts == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.floats(-1, 1), st.integers(2, 50))
def test_linear_ends_where_it_should(r, inflect, layers):
    amounts = MergeSchedule.linear(r, inflect, layers).amounts
    first = int(r * (1.0 - inflect))
    assert amounts[0] == first and amounts[-1] in (2 * r - first, 2 * r - first - 1)
    rising = [b - a for a, b in itertools.pairwise(amounts)]
    assert all(d >= 0 for d in rising) or all(d <= 0 for d in rising)


def test_a_list_is_padded():
    assert MergeSchedule.of([3, 2], 4).amounts == (3, 2, 0, 0)
    with pytest.raises(ValueError, match="amounts: 3 entries for 2 layers"):
        MergeSchedule.of([1, 2, 3], 2)


def test_steps_start_from_all_tokens():
    schedule = MergeSchedule.per_step(lambda i: 0.5 if i < 2 else 0, 4)
    assert schedule.tokens(100) == (50, 50, 100, 100)
    assert MergeSchedule.per_step([10, 0.25], 2).tokens(100) == (90, 75)
    assert MergeSchedule.per_step(3, 2).tokens(9) == (6, 6)
    assert schedule.flops_ratio(100, width=8) == pytest.approx(
        (block_flops(50, 50, 8) / block_flops(100, 100, 8) + 1) / 2
    )


def test_flops_by_hand():
    # One layer, d = 2, 4 tokens to 3: 8*4*4 + 4*16*2 + 16*3*4 over the same with 4.
    assert MergeSchedule.constant(1, 1).flops_ratio(4, width=2) == (128 + 128 + 192) / (128 + 128 + 256)
    # ViT-B/16 at 224 with r = 8, and attention's own quadratic part counted.
    assert MergeSchedule.constant(8, 12, protected=1).flops_ratio(197, width=768) == pytest.approx(0.7444, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 60), st.integers(1, 6), st.integers(0, 3), st.floats(0.05, 1))
def test_budget_is_met_and_no_smaller_one_meets_it(tokens, layers, protected, fraction):
    options = {"tokens": tokens, "layers": layers, "width": 16, "protected": protected}

    def ratio(total):
        low, larger = divmod(total, layers)
        return MergeSchedule.of([low + 1] * larger + [low] * (layers - larger), protected=protected).flops_ratio(
            tokens, width=16
        )

    every = [ratio(total) for total in range(layers * max((tokens - protected) // 2, 0) + 1)]
    assert every == sorted(every, reverse=True)
    meeting = [total for total, value in enumerate(every) if value <= fraction]
    if not meeting:
        with pytest.raises(ValueError, match="fraction: merging all"):
            MergeSchedule.budget(fraction, **options)
        return
    found = MergeSchedule.budget(fraction, **options)
    assert sum(found.amounts) == meeting[0] and max(found.amounts) - min(found.amounts) <= 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MergeSchedule(()), ValueError, "amounts: expected at least one"),
        (lambda: MergeSchedule((-1,)), ValueError, r"amounts\[0\]: .* at least 0, got -1"),
        (lambda: MergeSchedule((1.5,)), ValueError, r"amounts\[0\]: expected a share .* got 1.5"),
        (lambda: MergeSchedule((float("nan"),)), ValueError, r"amounts\[0\]: expected a finite"),
        (lambda: MergeSchedule((True,)), TypeError, r"amounts\[0\]: expected a whole number"),
        (lambda: MergeSchedule(("8",)), TypeError, r"amounts\[0\]"),
        (lambda: MergeSchedule((1,), axis="frame"), ValueError, "axis: expected one of"),
        (lambda: MergeSchedule((1,), protected=-1), ValueError, "protected: "),
        (lambda: MergeSchedule.constant(8, 0), ValueError, "layers: "),
        (lambda: MergeSchedule.linear(8, 1.5, 12), ValueError, "inflect: expected -1 to 1, got 1.5"),
        (lambda: MergeSchedule.budget(0, tokens=9, layers=2, width=8), ValueError, "fraction: "),
        (lambda: MergeSchedule.budget(0.5, tokens=0, layers=2, width=8), ValueError, "tokens: "),
        (lambda: MergeSchedule.per_step([1], 2), ValueError, "amount: expected 2 entries, got 1"),
        (lambda: MergeSchedule.constant(8, 2).r(2, 9), ValueError, "index: expected 0 to 1, got 2"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_print():
    assert str(MergeSchedule.of([8, 8, 4])) == "layers: 8 x 2, 4 x 1"

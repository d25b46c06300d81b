"""Reports: every site is in the table and in the JSON, sites that fared alike share a line, and every line says why."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import saccade
from saccade.swap import Recipe, Report, Rule
from saccade.swap.engine import put_in_place
from saccade.swap.report import COLUMNS, NUMBERS, Row
from saccade.swap.site import Choice, Cost, Site


def row(path="blocks.0.attn", *, cls="Attention", kind="attention", role="self", kernel="dense", change="", reason=None,
        fits=True, flops=None, moved=None):  # fmt: skip
    return Row(path, cls, "wan", kind, role, kernel, change, reason, fits, flops, moved)


def report(*rows, **options):
    return Report(Recipe([Rule("dense")], name="mine"), tuple(rows), **options)


HOLDERS = []  # a report does not keep them alive


def applied(made):
    """As `put_in_place` leaves it."""
    HOLDERS.append(nn.Linear(2, 2))
    put_in_place([(HOLDERS[-1], [])], made)
    return made


MIXED = (
    *(row(f"blocks.{i}.attn1", kernel="sliding_tile", change="processor", flops=(4e9, 1e9), moved=(2e6, 2e6)) for i in range(30)),
    *(row(f"blocks.{i}.attn2", role="cross", kernel="stock", reason="no rule of the recipe", fits=False) for i in range(30)),
    row("rope", cls="Rope", kind="rotary", kernel="rotary", change="in one pass", flops=(5e8, 5e8), moved=(30e6, 5e6)),
    row("proj.attn", kernel="stock", reason="Attention.forward has an untested source"),
)  # fmt: skip


def test_counts_and_groups():
    made = report(*MIXED, sizes={"wan": "21 x 30 x 52"})
    assert (len(made.swapped), len(made.skipped), len(made.unchanged)) == (31, 1, 30)
    lines, remarks = made.lines()
    assert all(len(line) == len(COLUMNS) for line in lines)
    assert [line[:4] for line in lines] == [
        ("blocks.0-29.attn1", "30", "self", "sliding_tile"),
        ("blocks.0-29.attn2", "30", "cross", "stock"),
        ("rope", "1", "rotary", "rotary"),
        ("proj.attn", "1", "self", "stock"),
    ]
    assert lines[0][4:6] == ("120 > 30", "60") and lines[1][4:6] == ("", "") and lines[2][4:6] == ("0.5", "30 > 5")
    said = dict(remark.split("  ", 1) for remark in remarks)
    assert [said[line[6]] for line in lines] == [
        "processor",
        "no rule of the recipe",
        "in one pass",
        "Attention.forward has an untested source",
    ]


def test_the_table_can_be_read():
    text = str(report(*MIXED, sizes={"wan": "21 x 30 x 52"}))
    lines = text.splitlines()
    assert lines[0] == "recipe mine: 31 sites swapped, 1 skipped, 30 left stock (planned, nothing is changed)"
    header, rule, *rest = lines[1:]
    assert header.split() == list(COLUMNS) and set(rule) == {"-"}
    table, below = rest[:4], rest[4:]
    assert len(rule) == max(len(line) for line in (header, *table)) <= 140
    for name in (COLUMNS[i] for i in range(len(COLUMNS)) if i not in NUMBERS):  # left columns begin below their names
        at = header.index(name)
        assert all(line[at] != " " and (at == 0 or line[at - 1] == " ") for line in table), name
    end = header.index("n ") + 1  # right columns end there
    assert all(line[end - 1].isdigit() and line[end] == " " for line in table)
    assert all(not line.endswith(" ") for line in lines)
    numbers = {line.split()[-1] for line in table}
    assert numbers == {line.split("  ")[0] for line in below[:-1]} and below[-1].startswith("estimates: ")
    assert "21 x 30 x 52" in below[-1]
    assert "(applied)" in str(applied(report(*MIXED))).splitlines()[0]


def test_no_site_at_all():
    made = saccade.plan(nn.Linear(2, 2), "balanced")
    assert made.rows == () and made.lines() == ([], []) and len(str(made).splitlines()) == 3
    assert json.loads(made.to_json())["sites"] == []


def test_what_differs_is_on_lines_of_its_own():
    base = row("a.0")
    others = [row("a.1", **change) for change in (
        {"cls": "Other"}, {"kind": "merge"}, {"role": "cross"}, {"kernel": "top_k"}, {"change": "x"}, {"reason": "y"}, {"fits": False}
    )]  # fmt: skip
    for other in others:
        assert len(report(base, other).lines()[0]) == 2
    assert len(report(base, row("a.1")).lines()[0]) == 1
    assert len(report(base, row("b.1")).lines()[0]) == 2


def test_estimates_are_shown_where_all_are_known():
    known, unknown = row("a.0", flops=(2e9, 1e9), moved=(1e6, 1e6)), row("a.1")
    assert report(known, unknown).lines()[0][0][4:6] == ("", "")
    assert report(known, row("a.1", flops=(3e9, 0.25e9), moved=(0.0, 0.0))).lines()[0][0][4:6] == ("5 > 1.25", "1")


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [
        ([3], "3"),
        ([0, 1], "0-1"),
        ([0, 1, 2, 9], "0-2,9"),
        ([1, 3, 5], "1,3,5"),
        ([0, 2, 4, 6, 8, 9], "0..9"),
        ([2, 10, 9, 1], "1-2,9-10"),
    ],
)
def test_ranges(numbers, shown):
    made = report(*(row(f"m.{n}.attn1") for n in numbers))
    (line,), _ = made.lines()
    assert line[:2] == (f"m.{shown}.attn1", str(len(numbers)))


name = st.sampled_from(["a", "attn1", "blocks", "x_2d"])
path = st.lists(name | st.integers(0, 12).map(str), min_size=1, max_size=4).map(".".join)


@given(
    st.lists(
        st.builds(
            row,
            path,
            role=st.sampled_from(["self", "cross"]),
            fits=st.booleans(),
            reason=st.none() | st.text(max_size=5),
        ),
        max_size=12,
    )
)
def test_every_row_is_counted_once(rows):
    made = report(*rows)
    lines, remarks = made.lines()
    assert (
        sum(int(line[1]) for line in lines) == len(rows) == len(made.swapped) + len(made.skipped) + len(made.unchanged)
    )
    assert {line[6] for line in lines if line[6]} == {remark.split("  ")[0] for remark in remarks}
    data = json.loads(made.to_json())
    assert [site["path"] for site in data["sites"]] == [r.path for r in rows]


def test_json(tmp_path):
    made = applied(report(*MIXED, sizes={"wan": "21 x 30 x 52"}))
    data = json.loads(made.to_json(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text("utf-8")) == data
    assert data["applied"] is True and data["assumed"] == {"wan": "21 x 30 x 52"} and data["notes"] == []
    assert Recipe.of(data["recipe"]) == made.recipe
    assert len(data["sites"]) == len(MIXED)
    assert data["sites"][0] == {**vars(MIXED[0]), "flops": [4e9, 1e9], "bytes": [2e6, 2e6]}


def test_a_row_of_a_choice():
    site = Site("a.attn", nn.Linear(2, 2), "attention", "self", frozenset({"dense"}))
    stock = Row.of(Choice(site, "wan", (), "no rule"))
    assert (stock.cls, stock.kernel, stock.fits, stock.reason, stock.flops) == (
        "Linear",
        "stock",
        False,
        "no rule",
        None,
    )
    steps = (Rule("dense", steps=(0, 2)), Rule("dense", steps=(2, 4)), Rule("radial"))
    swapped = Row.of(Choice(site, "wan", steps, None, "processor", Cost(2.0, 3.0), Cost(1.0, 3.0)))
    assert (
        swapped.kernel == "dense then radial"
        and swapped.fits
        and swapped.flops == (2.0, 1.0)
        and swapped.bytes == (3.0, 3.0)
    )
    assert Row.of(Choice(site, "wan", steps, "why not")).kernel == "stock"


def test_notes_of_contexts():
    class Told:
        def __init__(self, *notes):
            self.notes = list(notes)

    made = report(row(), contexts=(Told("first"), Told(), Told("second")))
    assert made.notes == ("first", "second") and str(made).splitlines()[-2:] == ["note: first", "note: second"]
    made.contexts[1].notes.append("later")
    assert json.loads(made.to_json())["notes"] == ["first", "later", "second"]
    made.set_step(3)
    made.reset()

"""Recipes: the same after saving, checked when they are made, and presets for every family."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade.swap import Recipe, Rule, preset, presets
from saccade.swap.presets import CAPTIONERS, FAMILIES, GENERATORS, KEPT, LEVELS
from saccade.swap.recipe import ATTENTION, KERNELS

# ---- round trip --------------------------------------------------------------------------------------------------------------
share = st.floats(0, 1, exclude_min=True)
tile = st.lists(st.integers(1, 64), min_size=3, max_size=3)
VALUES = {
    "tile": tile | tile.map(tuple),
    "window": st.integers(1, 9) | tile.map(tuple),
    "density": share,
    "stride": st.integers(1, 4),
    "dilation": tile.map(tuple),
    "width": st.floats(0.1, 9),
    "decay": st.floats(0.1, 9),
    "sink": st.booleans(),
    "block": st.sampled_from([32, 64, (64, 128)]),
    "keep": share | st.integers(1, 99),
    "p": share,
    "every": st.none() | st.integers(1, 9),
    "recall": st.none() | share,
    "positions": st.text(max_size=4),
    "gamma": st.none() | st.floats(0.1, 2),
    "r": st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=3),
    "proportional": st.booleans(),
}
interval = st.none() | st.tuples(st.integers(0, 50), st.none() | st.integers(51, 99))


@st.composite
def rules(draw):
    kernel = draw(st.sampled_from(sorted(KERNELS)))
    kind, taken = KERNELS[kernel]
    names = draw(st.sets(st.sampled_from(sorted(taken)))) if taken else set()
    if {"window", "density"} <= names:
        names.remove("window")
    return Rule(
        kernel,
        match=draw(st.sampled_from(["*", "*.blocks.*", "[!a]?"])),
        family=draw(st.sampled_from(["*", *FAMILIES])),
        role=draw(st.sampled_from(["*", "self", "[sj]*"])),
        layers=draw(interval | st.just((0, -1)) | st.just([2, -3])) if kind != "rotary" else None,
        steps=draw(interval) if kind == "attention" else None,
        params={name: draw(share if (kernel, name) == ("merge", "keep") else VALUES[name]) for name in names},
        on_unsupported=draw(st.sampled_from(["skip", "error"])),
    )


@given(st.lists(rules(), max_size=4), st.text(), st.text())
def test_saved_and_read_again(made, name, note):
    recipe = Recipe(made, name=name, note=note)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.of(json.loads(recipe.to_json())) == recipe
    assert Recipe.from_json(recipe.to_json()).to_json() == recipe.to_json()


def test_every_parameter_is_drawn():
    assert {name for _, taken in KERNELS.values() for name in taken} == set(VALUES)


def test_files(tmp_path):
    recipe = Recipe(
        [Rule("dense", layers=(0, 2)), {"kernel": "top_k", "params": {"keep": 0.5}}], name="été", note="“n”"
    )
    path = tmp_path / "r.json"
    recipe.save(path)
    assert Recipe.load(path) == Recipe.of(path) == Recipe.of(str(path)) == recipe
    assert json.loads(path.read_text("utf-8"))["schema"] == 1
    with pytest.raises(FileNotFoundError):
        Recipe.of(str(tmp_path / "none.json"))


def test_a_rule_does_not_hold_its_callers_data():
    params = {"tile": [1, 2, 3]}
    rule = Rule("sliding_tile", params=params)
    params["tile"][0] = 9
    assert rule.params == {"tile": [1, 2, 3]} and Rule("sliding_tile", params={"tile": (1, 2, 3)}) == rule
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.kernel = "dense"


# ---- which sites -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layers", "fitting"),
    [
        (None, {0, 1, 2, 3, 4, None}),
        ((0, None), {0, 1, 2, 3, 4}),
        ((1, 3), {1, 2}),
        ((0, -1), {0, 1, 2, 3}),
        ((3, -1), {3}),
        ((2, -4), set()),
        ((0, 99), {0, 1, 2, 3, 4}),
        ((0, -99), set()),
        ([4, None], {4}),
    ],
)
def test_layers(layers, fitting):
    rule = Rule("dense", layers=layers)
    assert {n for n in (*range(5), None) if rule.fits("x", "attention", "wan", "self", n, 5)} == fitting


def test_fits():
    rule = Rule("dense", match="*.attn1", family="wan", role="[sj]*")
    assert rule.fits("a.attn1", "attention", "wan", "self", 0, 1) and rule.fits(
        "a.attn1", "attention", "wan", "joint", 0, 1
    )
    for other in (
        ("a.attn2", "attention", "wan", "self"),
        ("a.attn1", "merge", "wan", "self"),
        ("a.attn1", "attention", "ltx", "self"),
        ("a.attn1", "attention", "wan", "cross"),
        ("A.ATTN1", "attention", "wan", "self"),
    ):
        assert not rule.fits(*other, 0, 1)
    assert Rule("merge").kind == "merge" and Rule("rotary").kind == "rotary" and Rule("svg").kind == "attention"
    assert {name for name in KERNELS if Rule(name).kind == "attention"} == ATTENTION


# ---- bad input ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({"kernel": "sparse"}, ValueError, "kernel: expected one of 'stock', .*, got 'sparse'"),
        ({"kernel": ["dense"]}, ValueError, "kernel: expected one of"),
        ({"kernel": "dense", "match": 3}, TypeError, "match: expected text, got 3"),
        ({"kernel": "dense", "family": None}, TypeError, "family: expected text, got None"),
        ({"kernel": "dense", "role": ["self"]}, TypeError, r"role: expected text, got \['self'\]"),
        ({"kernel": "dense", "on_unsupported": "warn"}, ValueError, "on_unsupported: expected one of 'skip', 'error', got 'warn'"),
        ({"kernel": "dense", "layers": 3}, TypeError, r"layers: expected \[first, last\), got 3"),
        ({"kernel": "dense", "layers": [1, 2, 3]}, TypeError, r"layers: expected \[first, last\), got \[1, 2, 3\]"),
        ({"kernel": "dense", "layers": [-1, 2]}, ValueError, r"layers\[0\]: expected a whole number of at least 0, got -1"),
        ({"kernel": "dense", "layers": [5, 3]}, ValueError, r"layers: expected \[first, last\) with first below last"),
        ({"kernel": "dense", "steps": [4, 4]}, ValueError, r"steps: expected \[first, last\) with first below last"),
        ({"kernel": "merge", "params": {"keep": 5}}, ValueError, r"params.keep: expected a share"),
        ({"kernel": "dense", "layers": [0, 2.5]}, TypeError, r"layers\[1\]: expected a whole number, got 2.5"),
        ({"kernel": "dense", "steps": [0, -1]}, ValueError, r"steps\[1\]: expected a whole number of at least 0, got -1"),
        ({"kernel": "merge", "steps": [0, 1]}, ValueError, "steps: merge is the same at every step"),
        ({"kernel": "rotary", "layers": [0, 1]}, ValueError, "layers: rotary is for a whole model"),
        ({"kernel": "rotary", "steps": [0, 1]}, ValueError, "steps: rotary is the same at every step"),
        ({"kernel": "dense", "params": [1]}, TypeError, "params: expected a mapping, got list"),
        ({"kernel": "dense", "params": {"density": 1}}, ValueError, "params: dense does not take density; accepted: none"),
        ({"kernel": "radial", "params": {"width": 1, 3: 4}}, ValueError, "params: radial does not take 3, width; accepted: block, decay"),
        ({"kernel": "svg", "params": {"width": 0}}, ValueError, "params.width: expected a number above 0, got 0"),
        ({"kernel": "svg", "params": {"sink": 1}}, TypeError, "params.sink: expected True or False, got 1"),
        ({"kernel": "radial", "params": {"decay": "1"}}, TypeError, "params.decay: expected a number, got '1'"),
        ({"kernel": "radial", "params": {"decay": float("nan")}}, TypeError, "params.decay: expected finite numbers, .* got nan"),
        ({"kernel": "radial", "params": {"block": {1, 2}}}, TypeError, "params.block: expected finite numbers, .* got {1, 2}"),
        ({"kernel": "sliding_tile", "params": {"density": 0}}, ValueError, "params.density: expected a number above 0, got 0"),
        ({"kernel": "sliding_tile", "params": {"density": 1.1}}, ValueError, "params.density: expected a share, .* at most 1, got 1.1"),
        ({"kernel": "sliding_tile", "params": {"tile": [4, 8]}}, ValueError, "params.tile: expected three sizes .* got 2"),
        ({"kernel": "sliding_tile", "params": {"tile": [4, 8, 0]}}, ValueError, r"params.tile\[2\]: .* at least 1, got 0"),
        ({"kernel": "neighborhood", "params": {"density": 0.5, "window": 3}}, ValueError, "params: neighborhood takes one of window and"),
        ({"kernel": "top_p", "params": {"p": 2}}, ValueError, "params.p: expected a share, .* got 2"),
        ({"kernel": "top_k", "params": {"keep": 0}}, ValueError, "params.keep: expected a share, .* or a whole number of .* 1, got 0"),
        ({"kernel": "top_k", "params": {"keep": 1.5}}, ValueError, "params.keep: .* got 1.5"),
        ({"kernel": "top_k", "params": {"keep": True}}, TypeError, "params.keep: .* got True"),
        ({"kernel": "top_k", "params": {"every": 0}}, ValueError, "params.every: expected a whole number of at least 1, got 0"),
        ({"kernel": "top_k", "params": {"recall": 3}}, ValueError, "params.recall: expected a share, .* got 3"),
        ({"kernel": "merge", "params": {"proportional": "yes"}}, TypeError, "params.proportional: expected True or False, got 'yes'"),
    ],
)  # fmt: skip
def test_bad_rules(rule, error, message):
    with pytest.raises(error, match="^" + message):
        Rule(**rule)
    with pytest.raises(error, match=r"^rules\[1\]\." + message):
        Recipe([Rule("dense"), rule])


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (3, TypeError, "recipe: expected a Recipe, a preset's name, the path of a JSON file or a mapping, got int"),
        (None, TypeError, "recipe: expected .* got NoneType"),
        ({}, ValueError, "recipe: rules are missing"),
        ({"rules": [], "kernels": 1, 4: 5}, ValueError, "recipe: unknown keys 4, kernels; accepted: schema, name, note, rules"),
        ({"schema": 2, "rules": []}, ValueError, "recipe: schema 2, but this Saccade reads schema 1"),
        ({"schema": "1", "rules": []}, ValueError, "recipe: schema '1', but"),
        ({"rules": "dense"}, TypeError, "rules: expected a list or tuple, got str"),
        ({"rules": {"kernel": "dense"}}, TypeError, "rules: expected a list or tuple, got dict"),
        ({"rules": 5}, TypeError, "rules: expected a list or tuple, got int"),
        ({"rules": ["dense"]}, TypeError, r"rules\[0\]: expected a Rule or a mapping, got str"),
        ({"rules": [{"role": "self"}]}, ValueError, r"rules\[0\]: the kernel is missing; accepted: kernel, match"),
        ({"rules": [{"kernel": "dense", "layer": 1, 2: 3}]}, ValueError, r"rules\[0\]: unknown keys 2, layer; accepted: kernel"),
        ({"rules": [], "name": 5}, TypeError, "name: expected text, got 5"),
        ({"rules": [], "note": None}, TypeError, "note: expected text, got None"),
        ("fast", ValueError, "recipe: there is no preset 'fast'; levels: lossless, conservative, balanced, aggressive"),
        ("", ValueError, "recipe: there is no preset ''"),
        ("wan-fast", ValueError, "recipe: there is no preset 'wan-fast'"),
        ("van-balanced", ValueError, "recipe: there is no preset 'van-balanced'; .*wan"),
        ("-balanced", ValueError, "recipe: there is no preset '-balanced'"),
    ],
)  # fmt: skip
def test_bad_recipes(value, error, message):
    with pytest.raises(error, match="^" + message):
        Recipe.of(value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"balanced"', '"elsewhere.json"', "null"])
def test_text_that_is_no_recipe(text):
    with pytest.raises(ValueError, match=r"recipe: expected (JSON, |a JSON object)"):
        Recipe.from_json(text)


# ---- presets -----------------------------------------------------------------------------------------------------------------
def test_presets():
    made = presets()
    assert len(made) == len({r.name for r in made}) == len(LEVELS) * (1 + len(FAMILIES))
    for recipe in made:
        assert recipe.rules and recipe.note and Recipe.from_json(recipe.to_json()) == recipe == preset(recipe.name)


def test_a_level_is_that_of_all_families():
    for level in LEVELS:
        assert preset(level).rules == tuple(rule for family in FAMILIES for rule in preset(f"{family}-{level}").rules)


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_of_a_family(family):
    for level in LEVELS:
        rules = preset(f"{family}-{level}").rules
        assert {rule.family for rule in rules} == {family}
        exact = {rule.kernel for rule in rules} <= {"stock", "dense", "rotary"}
        assert exact == (level == "lossless")
    if family in CAPTIONERS:
        kept = [
            rule.params["keep"]
            for level in KEPT
            for rule in preset(f"{family}-{level}").rules
            if rule.kernel == "merge"
        ]
    else:
        assert family in GENERATORS
        kept = [rule.params["density"] for level in KEPT for rule in preset(f"{family}-{level}").rules if rule.params]
    assert len(kept) == 3 and kept == sorted(kept, reverse=True) and kept[-1] > 0 and kept[0] < 1

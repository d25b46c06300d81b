"""Edits: put in place and taken back exactly, all or none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from saccade.swap.edit import Attribute, PreHook, apply_all, method, undo_all


def twice(self, x):
    return 2 * type(self).forward(self, x)


class Plus:
    """A hook that counts its calls and adds to the input."""

    def __init__(self, n):
        self.n, self.calls = n, 0

    def __call__(self, module, args, kwargs):
        self.calls += 1
        return (args[0] + self.n, *args[1:]), kwargs


class Fails:
    path = "here"

    def __init__(self, log=None):
        self.log = [] if log is None else log

    def apply(self):
        self.log.append("apply")
        raise ZeroDivisionError

    def covered(self):
        return None

    def undo(self):
        self.log.append("undo")


def state(module):
    return list(vars(module)), {k: id(v) for k, v in vars(module).items()}, dict(module._forward_pre_hooks)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def test_a_method_is_hidden_and_shown_again(linear):
    x, before = torch.randn(2, 3), state(linear)
    stock = linear(x)
    edit = Attribute("it", linear, "forward", method(twice, linear))
    for _ in range(2):
        edit.apply()
        assert torch.equal(linear(x), 2 * stock) and edit.covered() is None
        edit.undo()
        edit.undo()
        assert state(linear) == before and torch.equal(linear(x), stock)


@pytest.mark.parametrize("value", [None, 5, print])
def test_an_attribute_that_was_there_comes_back(linear, value):
    linear.processor = value
    linear.after = 1
    before = state(linear)
    edit = Attribute("it", linear, "processor", object())
    edit.apply()
    assert linear.processor is edit.value
    edit.undo()
    assert linear.processor is value and state(linear) == before


def test_a_submodule_is_hidden_but_stays_registered():
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    keys, first = list(block.state_dict()), block[0]
    edit = Attribute("0", block, "0", nn.Identity())
    edit.apply()
    assert getattr(block, "0") is edit.value and list(block.state_dict()) == keys and block._modules["0"] is first
    edit.undo()
    assert getattr(block, "0") is first


def test_a_class_and_another_instance_are_not_touched(linear):
    other, forward = nn.Linear(3, 3), nn.Linear.forward
    edit = Attribute("it", linear, "forward", method(twice, linear))
    edit.apply()
    assert nn.Linear.forward is forward and "forward" not in vars(other)
    edit.undo()


def test_a_pre_hook_runs_first(linear):
    seen = []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    before, x = state(linear), torch.zeros(1, 3)
    edit = PreHook("it", linear, Plus(1))
    edit.apply()
    linear(x)
    assert edit.hook.calls == 1 and torch.equal(seen[0], x + 1) and edit.covered() is None
    edit.undo()
    edit.undo()
    linear(x)
    assert edit.hook.calls == 1 and torch.equal(seen[1], x) and state(linear) == before


def test_all_or_none(linear):
    before, log = state(linear), []
    hook, fails = PreHook("it", linear, Plus(1)), Fails(log)
    late = Attribute("it", linear, "never", 1)
    edits = [Attribute("it", linear, "forward", method(twice, linear)), hook, fails, late]
    with pytest.raises(ZeroDivisionError):
        apply_all(edits)
    assert state(linear) == before and log == ["apply", "undo"]
    apply_all(edits[:2])
    assert "forward" in vars(linear) and linear._forward_pre_hooks
    undo_all(edits)  # those that are not in place as well
    assert state(linear) == before


def test_a_target_without_attributes_fails_alone(linear):
    before = state(linear)
    with pytest.raises(TypeError):
        apply_all([Attribute("it", linear, "forward", method(twice, linear)), Attribute("n", 5, "name", 1)])
    assert state(linear) == before


def test_what_lies_on_top_is_not_torn_out(linear):
    other = nn.Linear(3, 3)
    edits = [
        Attribute("a", linear, "forward", method(twice, linear)),
        PreHook("a", linear, Plus(1)),
        Attribute("b", other, "forward", method(twice, other)),
    ]
    apply_all(edits)
    ours = linear.forward
    linear.forward = lambda x: x
    assert edits[0].covered() == "a: forward was replaced after the swap" and edits[2].covered() is None
    with pytest.raises(RuntimeError, match=r"^a: forward was replaced after the swap; undo that first, then restore"):
        undo_all(edits)
    assert "forward" in vars(other) and linear._forward_pre_hooks
    del other.forward
    with pytest.raises(RuntimeError, match="swap and 1 more; undo that first"):
        undo_all(edits)
    linear.forward, other.forward = ours, edits[2].value
    undo_all(edits)
    assert "forward" not in vars(linear) and "forward" not in vars(other) and not linear._forward_pre_hooks


def test_the_last_is_taken_back_first(linear):
    """Two edits of one place, the second over the first."""
    linear.mark = "stock"
    log = []

    class Logged(Attribute):
        def covered(self):
            return None

        def undo(self):
            super().undo()
            log.append(vars(self.target).get("mark"))

    edits = [Logged("it", linear, "mark", n) for n in ("one", "two")]
    apply_all(edits)
    assert linear.mark == "two"
    undo_all(edits)
    assert log == ["one", "stock"] and linear.mark == "stock"


def test_a_copy_is_undone_by_itself(linear):
    x = torch.ones(1, 3)
    edits = [Attribute("it", linear, "forward", method(twice, linear)), PreHook("it", linear, Plus(1))]
    stock = linear(x)
    apply_all(edits)
    swapped = linear(x)
    twin, its = copy.deepcopy((linear, edits))
    undo_all(edits)
    assert torch.equal(linear(x), stock) and torch.equal(twin(x), swapped)
    assert twin.forward.__self__ is twin and its[1].hook is not edits[1].hook
    undo_all(its)
    assert torch.equal(twin(x), stock) and "forward" not in vars(twin) and not twin._forward_pre_hooks

"""torch.compile without graph breaks, opcheck of every raw op, and the cost of a call."""

from __future__ import annotations

import pytest
import torch
from rope.rope_cases import SPECS, spec

import saccade
from saccade._load import schemas
from saccade.rope import apply_rope, qk_norm_rope
from saccade.testing import rope_inputs


def both(q, k, p, w, s):
    q, k = apply_rope(q, k, p, s)
    q, k = qk_norm_rope(q, k, p, s, w, w)
    return q, k


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["d128-hope", "d96-groups"])
def test_fullgraph_forward_and_backward(backend, name):
    torch._dynamo.reset()
    s = SPECS[name]
    q, k, p = rope_inputs(s)
    w = torch.linspace(0.5, 1.5, s.head_dim)

    def run(function):
        leaves = [x.clone().requires_grad_() for x in (q, k, w)]
        outs = function(leaves[0], leaves[1], p, leaves[2], s)
        return [*outs, *torch.autograd.grad(outs[0].sum() + outs[1].square().sum(), leaves)]

    compiled = torch.compile(both, fullgraph=True, backend=backend)
    for a, b in zip(run(compiled), run(both), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_fullgraph_in_place():
    torch._dynamo.reset()
    s = SPECS["d128-hope"]
    q, k, p = rope_inputs(s)

    def run(q, k):
        apply_rope(q, k, p, s, inplace=True)
        qk_norm_rope(q, k, p, s, None, None, inplace=True)

    eager, compiled = (q.clone(), k.clone()), (q.clone(), k.clone())
    run(*eager)
    torch.compile(run, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])


def test_lengths_share_one_graph():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    s = SPECS["d128"]
    function = torch.compile(lambda q, p: apply_rope(q, None, p, s)[0], backend=counter, fullgraph=True, dynamic=True)
    for tokens in (17, 33, 64):
        q, _, p = rope_inputs(s, tokens=tokens)
        function(q, p)
    assert counter.frame_count == 1


S = spec(64, zeros=4)
Q, K, P = rope_inputs(S, tokens=7)
W = torch.ones(64)
STATIC = (S.shift, *S.active, False, 1.0)
CALLS = {
    "apply_rope": [(Q, K, P, S.steps(), *STATIC, False), (Q, None, P, S.steps(), *STATIC, True)],
    "apply_rope_": [(Q, K, P, S.steps(), *STATIC, False), (Q, None, P, S.steps(), *STATIC, False)],
    "rope_freq_grad": [(Q, K, Q, K, P, 1, 32, False), (Q, None, Q, None, P, 2, 16, True)],
    "qk_norm_rope": [(Q, K, W, None, P, S.steps(), *STATIC, 1e-6, False)],
    "qk_norm_rope_": [(Q, K, None, W, P, S.steps(), *STATIC, 1e-6, False)],
    "qk_norm_rope_bwd": [
        (Q, K, Q, K, W, W, P, S.steps(), *STATIC, 1e-6, False),
        (Q, None, Q, None, None, None, P, S.steps(), *STATIC, 0.0, True),
    ],
}


def test_every_op_is_checked():
    assert set(CALLS) == {n for n in schemas() if "rope" in n}


@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op):
    for arguments in CALLS[op]:
        arguments = tuple(a.clone() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)
        torch.library.opcheck(getattr(torch.ops.saccade, op).default, arguments)


def test_explain_says_which_and_why():
    answer = saccade.explain(apply_rope, Q, K, P, S)
    assert answer.chosen == "cpu" and answer.verdicts["cuda"].startswith("needs tensors on a CUDA device")
    assert "* cpu" in str(answer)
    with pytest.raises(ValueError, match="op: expected one of"):
        saccade.explain("rope", Q)

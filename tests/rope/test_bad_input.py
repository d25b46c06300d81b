"""Bad input to apply_rope and qk_norm_rope: an error that names the argument, and nothing written."""

from __future__ import annotations

import pytest
import torch
from rope.rope_cases import spec

from saccade.rope import RopeSpec, apply_rope, qk_norm_rope

S = spec(64)
ONE = spec(64, axes=1)


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


Q, K, P = ones(2, 4, 5, 64), ones(2, 2, 5, 64), torch.zeros(3, 5, dtype=torch.int64)
LEARNED = RopeSpec(64, torch.zeros(3, 1, 32, requires_grad=True), None)

# arguments, error, what the message must hold
BAD = {
    "q not a tensor": (([1.0], None, P, S), TypeError, "q: expected a tensor"),
    "q of 3 dimensions": ((ones(4, 5, 64), None, P, S), ValueError, "q: expected 4 dimensions"),
    "q of int": ((Q.long(), None, P, S), TypeError, "q: expected dtype"),
    "q of complex": ((Q.to(torch.complex64), None, P, S), TypeError, "q: expected dtype"),
    "head_dim": ((ones(2, 4, 5, 32), None, P, S), ValueError, "q: expected head_dim 64"),
    "last stride": ((ones(2, 4, 5, 128)[..., ::2], None, P, S), ValueError, "q: expected a last dimension of stride 1"),
    "k dtype": ((Q, K.half(), P, S), TypeError, "k: expected the dtype of q"),
    "k device": ((Q, K.to("meta"), P, S), ValueError, "k: expected the device of q"),
    "k length": ((Q, ones(2, 2, 6, 64), P, S), ValueError, "k: expected batch and length of q"),
    "k batch": ((Q, ones(1, 2, 5, 64), P, S), ValueError, "k: expected batch and length of q"),
    "groups": ((ones(2, 3, 5, 64), None, P, spec(64, groups=2)), ValueError, "q: the spec has 2 head groups"),
    "k groups": ((Q, ones(2, 3, 5, 64), P, spec(64, groups=2)), ValueError, "k: the spec has 2 head groups"),
    "no spec": ((Q, K, P, "hope"), TypeError, "spec: expected a RopeSpec"),
    "positions type": ((Q, K, [0, 1], S), TypeError, "positions: expected a tensor"),
    "positions dtype": ((Q, K, P.to(torch.bfloat16), S), TypeError, "positions: expected dtype"),
    "positions bool": ((Q, K, P.bool(), S), TypeError, "positions: expected dtype"),
    "positions count": ((Q, K, P[:, :4], S), ValueError, "positions: expected"),
    "positions axes": ((Q, K, P[:2], S), ValueError, "positions: expected"),
    "positions 1-D for 3 axes": ((Q, K, P[0], S), ValueError, "positions: expected"),
    "positions batch": ((Q, K, P[:, None].expand(3, 3, 5), S), ValueError, "positions: expected"),
    "positions device": ((Q, K, P.to("meta"), S), ValueError, "positions: expected the device of q"),
    "positions grad": ((Q, K, P.float().requires_grad_(), S), ValueError, "positions: gradients"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("op", ["apply_rope", "qk_norm_rope"])
@pytest.mark.parametrize("inplace", [False, True])
def test_shared_checks(op, case, inplace):
    arguments, error, message = BAD[case]
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(error, match=".*") as caught:
        if op == "apply_rope":
            apply_rope(*arguments, inplace=inplace)
        else:
            qk_norm_rope(*arguments, None, None, inplace=inplace)
    assert message in str(caught.value)
    for a, b in zip(arguments, before, strict=True):
        if isinstance(a, torch.Tensor) and a.device.type == "cpu":
            assert torch.equal(a, b)


INPLACE = {
    "q requires grad": ((Q.clone().requires_grad_(), None, P, S), "inplace: q requires grad"),
    "k requires grad": ((Q.clone(), K.clone().requires_grad_(), P, S), "inplace: k requires grad"),
    "expanded q": ((ones(2, 1, 5, 64).expand(2, 4, 5, 64), None, P, S), "q: in place needs elements that do not share"),
    "overlapping q": ((ones(2 * 5 * 64 + 96).as_strided((2, 1, 5, 64), (320, 320, 32, 1)), None, P, S), "do not share"),
    "q is k": ((Q, Q, P, S), "k: in place needs q and k in different memory"),
}


@pytest.mark.parametrize("case", INPLACE)
@pytest.mark.parametrize("op", ["apply_rope", "qk_norm_rope"])
def test_in_place_checks(op, case):
    arguments, message = INPLACE[case]
    with pytest.raises(ValueError, match=".*") as caught:
        if op == "apply_rope":
            apply_rope(*arguments, inplace=True)
        else:
            qk_norm_rope(*arguments, None, None, inplace=True)
    assert message in str(caught.value)


def test_in_place_with_learned_frequencies():
    with pytest.raises(ValueError, match="inplace: the spec's inv_freq requires grad"):
        apply_rope(Q.clone(), None, P, LEARNED, inplace=True)
    with torch.no_grad():
        apply_rope(Q.clone(), None, P, LEARNED, inplace=True)


NORM = {
    "weight length": (dict(q_weight=ones(32)), ValueError, "q_weight: expected"),
    "row weight": (dict(q_weight=ones(64), norm="row"), ValueError, "q_weight: expected"),
    "weight dtype": (dict(q_weight=ones(64).double()), TypeError, "q_weight: expected dtype"),
    "weight type": (dict(k_weight=1.0), TypeError, "k_weight: expected a tensor"),
    "weight device": (dict(k_weight=ones(64).to("meta")), ValueError, "k_weight: expected the device"),
    "norm": (dict(norm="layer"), ValueError, "norm: expected"),
    "eps negative": (dict(eps=-1.0), ValueError, "eps: expected"),
    "eps nan": (dict(eps=float("nan")), ValueError, "eps: expected"),
    "eps bool": (dict(eps=True), ValueError, "eps: expected"),
    "learned": (dict(spec=LEARNED), ValueError, "spec: qk_norm_rope takes static frequencies"),
    "weight without k": (dict(k=None, k_weight=ones(64)), ValueError, "k_weight: there is no k"),
    "in place weight grad": (
        dict(inplace=True, q_weight=ones(64).requires_grad_()),
        ValueError,
        "inplace: a weight requires",
    ),
}


@pytest.mark.parametrize("case", NORM)
def test_norm_checks(case):
    changes, error, message = NORM[case]
    arguments = dict(q=Q.clone(), k=K.clone(), positions=P, spec=S, q_weight=None, k_weight=None) | changes
    with pytest.raises(error, match=".*") as caught:
        qk_norm_rope(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_explicit_implementation_that_cannot_run(impl):
    with pytest.raises(ValueError, match=f"impl: '{impl}' cannot run apply_rope here: needs tensors on a CUDA device"):
        apply_rope(Q, K, P, S, impl=impl)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="impl: expected one of"):
        apply_rope(Q, K, P, S, impl="gpu")


def test_meta_tensors_have_no_kernel():
    with pytest.raises((ValueError, NotImplementedError)):
        apply_rope(Q.to("meta"), None, P.to("meta"), S, impl="cpu")


def test_raw_op_keeps_memory_safe():
    """Direct callers of the raw op get errors too, not a crash."""
    steps, p = S.steps(), P[:, None]
    raw = torch.ops.saccade.apply_rope
    with pytest.raises(RuntimeError, match="positions"):
        raw(Q, K, p[:, :, :3], steps, 0, 0, 32, False, 1.0, False)
    with pytest.raises(RuntimeError, match="begin, end"):
        raw(Q, K, p, steps, 0, 0, 33, False, 1.0, False)
    with pytest.raises(RuntimeError, match="steps"):
        raw(Q, K, p, steps[:2].clone(), 0, 0, 32, False, 1.0, False)
    with pytest.raises(RuntimeError, match="shift"):
        raw(Q, K, p, steps, 99, 0, 32, False, 1.0, False)
    with pytest.raises(RuntimeError, match="k: expected"):
        raw(Q, K[:1], p, steps, 0, 0, 32, False, 1.0, False)

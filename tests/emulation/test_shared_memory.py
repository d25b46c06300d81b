"""No launch asks for more dynamic shared memory than tests/build/resources.json grants, on the shapes that need most."""

from __future__ import annotations

import json

import pytest
import torch
from emulation.attention_cases import problem as attention_problem
from emulation.cases import F16, Case, problem
from emulation.cuda_emulator import HERE, library
from emulation.test_apply_rope import run as run_apply_rope
from emulation.test_attention_bias_grad import run as run_bias_grad
from emulation.test_knn_density import run as run_knn_density
from emulation.test_match import places
from emulation.test_match import run as run_match
from emulation.test_qk_norm_rope import run as run_qk_norm_rope
from emulation.test_qk_norm_rope import run_backward, weights
from emulation.test_rope_freq_grad import run as run_rope_freq_grad
from emulation.test_sparse_attention import run as run_attention
from emulation.test_sparse_attention_bwd import run as run_attention_bwd

from saccade.attention.layout import BlockLayout

TABLE = json.loads((HERE.parent / "build" / "resources.json").read_text())


@pytest.mark.parametrize("op", ["apply_rope", "qk_norm_rope", "qk_norm_rope_bwd", "rope_freq_grad"])
def test_the_largest_launch_is_inside_the_budget(op: str) -> None:
    if op == "apply_rope":  # a full table of many tokens, with all axes
        case = Case("many", F16, shape=(1, 1, 1, 300, 128), axes=8, inplace=True)
    elif op == "rope_freq_grad":
        case = Case("narrow", F16, shape=(1, 1, 1, 10, 16))
    else:  # the longest row that stays in registers, each head with its own angles
        case = Case("wide", F16, shape=(1, 64, 64, 1, 128), groups=64, axes=8)
    q, k, positions, steps = problem(case)
    assert k is not None
    w = weights(case, True, F16)
    library(op).emulated_largest_shared()  # forget the launches of other tests
    if op == "apply_rope":
        run_apply_rope(case, q, k, positions, steps)
    elif op == "rope_freq_grad":
        run_rope_freq_grad(case, q, k, q, k, positions, steps.shape[2])
    elif op == "qk_norm_rope":
        run_qk_norm_rope(case, True, q, k, positions, steps, *w)
    else:
        run_backward(case, True, q, k, torch.ones_like(q), torch.ones_like(k), positions, steps, *w)
    largest, granted = library(op).emulated_largest_shared(), TABLE[op]["dynamic_shared"]
    assert granted / 2 < largest <= granted


@pytest.mark.parametrize("op", ["match", "knn_density"])
def test_the_largest_tile_is_inside_the_budget(op: str) -> None:
    library(op).emulated_largest_shared()
    if op == "match":  # the large tile, and as many channels as stay in shared memory
        run_match(torch.ones(3, 4, 192, dtype=F16), places([0, 1]), places([2, 3]))
    else:  # the longest lists
        run_knn_density(torch.ones(1, 32, 8, dtype=F16), 32)
    largest, granted = library(op).emulated_largest_shared(), TABLE[op]["dynamic_shared"]
    assert largest == granted


@pytest.mark.parametrize("op", ["sparse_attention", "sparse_attention_bwd", "attention_bias_grad"])
def test_the_widest_heads_are_inside_the_budget(op: str) -> None:
    p = attention_problem(BlockLayout.dense(3, 3), width=256, bias=(1, 1))
    library(op).emulated_largest_shared()
    rows = torch.zeros(1, 1, 3)
    if op == "sparse_attention":
        run_attention(p)
    elif op == "sparse_attention_bwd":
        run_attention_bwd(p, p.q, None, p.q, rows)
    else:
        run_bias_grad(p, p.q, rows, rows)
    largest, granted = library(op).emulated_largest_shared(), TABLE[op]["dynamic_shared"]
    assert largest == granted

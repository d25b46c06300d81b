r"""Which key blocks a query block sees, by the product of their pooled tokens.

For query block I of head h and key block J of key head h // (H / Hk), in fp32:

    s_IJ = scale * (q_I . k_J),    NaN counts as -inf
    w_IJ = exp(s_IJ - max over candidates of s_I),    1 where s_IJ is that maximum, so that infinities have weights too

Candidates (classes 1 and 2) are ranked by s, the largest first, the lowest J first among equals. Of these are chosen

    mode 0 (top)        the first `keep`
    mode 1 (share)      the fewest, of the first, whose weights sum to at least p of the weights of all candidates; all where p >= 1
    mode 2 (threshold)  those with w_IJ at least p of that sum

in modes 1 and 2 never fewer than `keep`, and never more than there are candidates. Classes 3 and 4 are chosen besides, always; they take no
part in the sum and do not count towards `keep`. Mode 0 is the top-k of VSA (arXiv 2505.13389), MoBA and SLA; mode 1 the cumulative share of
NABLA (2507.13546), SpargeAttn and SVG2; mode 2 a threshold on the pooled attention map.

Chosen blocks of classes 1 and 3 make the list of full blocks, those of 2 and 4 the list of partial ones, each ascending.
"""

from __future__ import annotations

import torch

TOP, SHARE, THRESHOLD = 0, 1, 2
NEVER, CANDIDATE, CANDIDATE_PARTIAL, ALWAYS, ALWAYS_PARTIAL = range(5)


def block_select(
    q: torch.Tensor, k: torch.Tensor, classes: torch.Tensor | None, mode: int, keep: int, p: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts [B, H, nQ], indices [B, H, nQ, width], p_counts and p_indices, all int32; 0 behind the count.

    Args:
        q: [B, H, nQ, D] fp32, pooled queries.
        k: [B, Hk, nK, D] fp32, pooled keys; Hk divides H.
        classes: [1|B, 1|H, nQ, nK] uint8, or None: all CANDIDATE, and p_counts and p_indices are empty.
        mode: TOP, SHARE or THRESHOLD.
        keep: blocks to choose, at least.
        p: share of the weights, rounded to fp32.
        scale: of the scores.

    width is min(keep, nK) in mode 0 without classes, else nK.
    """
    scores = scale * (q @ k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1).mT)
    return select_by_scores(scores, classes, mode, keep, p)


def select_by_scores(
    scores: torch.Tensor, classes: torch.Tensor | None, mode: int, keep: int, p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same from scores [B, H, nQ, nK] of any origin."""
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    width = scores.shape[3]
    parts: tuple[int, ...]
    if classes is None:
        classes = torch.full((1, 1, *scores.shape[2:]), CANDIDATE, dtype=torch.uint8, device=scores.device)
        parts, width = (CANDIDATE,), min(keep, width) if mode == TOP else width
    else:
        parts = CANDIDATE, CANDIDATE_PARTIAL
    classes = classes.expand(scores.shape)
    chosen = _choose(scores, (classes == CANDIDATE) | (classes == CANDIDATE_PARTIAL), mode, keep, p)
    chosen = chosen | (classes >= ALWAYS)
    lists = [_lists(chosen & ((classes == c) | (classes == c + 2)), width) for c in parts]
    none = scores.new_empty(0, dtype=torch.int32)
    counts, indices = lists[0]
    return counts, indices, *(lists[1] if len(lists) > 1 else (none, none.clone()))


def _choose(scores: torch.Tensor, candidate: torch.Tensor, mode: int, keep: int, p: float) -> torch.Tensor:
    # Stable sorts: by score, then candidates before the others.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, candidate.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    if mode == TOP or scores.shape[-1] == 0:
        return candidate & (rank < keep)
    best = scores.masked_fill(~candidate, float("-inf")).amax(-1, keepdim=True)
    weight = torch.where(scores == best, 1.0, (scores - best).double().exp()).masked_fill(~candidate, 0.0)
    need = weight.new_full((), p, dtype=torch.float32) * weight.sum(-1, keepdim=True)
    if mode == THRESHOLD:
        taken = weight >= need
    else:
        before = torch.nn.functional.pad(
            weight.gather(-1, order).cumsum(-1)[..., :-1], (1, 0)
        )  # of those ranked higher
        taken = (before < need).gather(-1, rank) | (p >= 1)
    return candidate & (taken | (rank < keep))


def _lists(chosen: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    counts = chosen.sum(-1, dtype=torch.int32)
    indices = chosen.int().argsort(dim=-1, descending=True, stable=True)[..., :width]  # chosen first, each ascending
    place = torch.arange(indices.shape[-1], device=indices.device)
    return counts, indices.where(place < counts[..., None], 0).int()

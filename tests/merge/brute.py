"""The semantics once more, in Python loops over float64: no code shared with the library."""

from __future__ import annotations

import math


def score_of(a, b, kind):
    """Score of two rows; None where one of them is not finite (in fp32)."""
    dot, aa, bb = (math.fsum(p * q for p, q in zip(x, y, strict=True)) for x, y in ((a, b), (a, a), (b, b)))
    if kind == "dot":
        return dot
    if kind == "l2":
        return min(2 * dot - aa - bb, 0.0)
    return 0.0 if aa == 0 or bb == 0 else dot / math.sqrt(aa) / math.sqrt(bb)


def finite(row):
    return math.fsum(v * v for v in row) <= 3.4028235e38 if all(math.isfinite(v) for v in row) else False


def match(rows, src, dst, kind, allowed=None, protect=()):
    """Score and target lists of one sample: rows is a list of lists, allowed[i][j] whether source i may choose dst[j]."""
    n = len(rows)
    good = [finite(r) for r in rows]
    score, target = [-math.inf] * n, [-1 if g else -2 for g in good]
    for i, s in enumerate(src):
        if not good[s] or s in protect:
            continue
        for j, d in enumerate(dst):
            if not good[d] or d in protect or (allowed is not None and not allowed[i][j]):
                continue
            value = score_of(rows[s], rows[d], kind)
            if target[s] == -1 or value > score[s]:
                score[s], target[s] = value, d
    return score, target


def chosen(scores, targets, r, threshold):
    """Which tokens of the samples `scores` (lists) are merged, r of all together."""
    found = [
        (-s, b, n)
        for b, row in enumerate(scores)
        for n, s in enumerate(row)
        if targets[b][n] >= 0 and not math.isnan(s) and s >= threshold
    ]
    found.sort()  # best first; -0.0 == 0.0 in Python too; then sample, then place
    return {(b, n) for _, b, n in found[:r]}


def plan(target, merged, rows):
    """inverse, head, counts of one sample; `merged` holds the places that are merged."""
    n = len(target)
    kept = [t for t in range(n) if t not in merged]
    excess = max(len(kept) - rows, 0)
    for t in [t for t in kept if target[t] == -2][:excess]:
        kept.remove(t)
    kept = kept[:rows]
    row = {t: i for i, t in enumerate(kept)}
    inverse = [row.get(target[t], -1) if t in merged else row.get(t, -1) for t in range(n)]
    return inverse, kept + [-1] * (rows - len(kept)), len(kept)


def members(inverse, rows):
    """ptr and members of one sample."""
    ptr, out = [0], []
    for m in range(rows):
        out += [t for t, i in enumerate(inverse) if i == m]
        ptr.append(len(out))
    return ptr, out + [-1] * (len(inverse) - len(out))


def merge(x, weight, inverse, head, mode):
    """Rows and totals of one sample; x is a list of lists of floats."""
    width = len(x[0]) if x else 0
    y, total = [], []
    for m, h in enumerate(head):
        own = [t for t, i in enumerate(inverse) if i == m]
        w = [weight[t] if weight else 1.0 for t in own]
        total.append(math.fsum(w))
        if h < 0:
            y.append([0.0] * width)
        elif mode == "replace":
            y.append(list(x[h]))
        elif mode == "max":
            y.append([max(x[t][c] for t in own) for c in range(width)])
        elif mode == "sum":
            y.append([math.fsum(x[t][c] for t in own) for c in range(width)])
        else:
            y.append(
                [
                    math.fsum(wt * x[t][c] for wt, t in zip(w, own, strict=True)) / (total[-1] or 1.0)
                    for c in range(width)
                ]
            )
    return y, total

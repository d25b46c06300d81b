"""ToMe in float64 from its semantics: one sample at a time, in loops over edges. Shares no code with the package."""

from __future__ import annotations

import math

import torch


class Oracle:
    """Bipartite soft matching of one sample [N, C]: which token merges into which, and the rows in ToMe's order.

    src, dst: positions. protected: positions that neither choose nor are chosen. rows: "sorted" (unmerged by position), "ranked"
    (by falling similarity); distill puts destination 0 second.
    """

    def __init__(self, metric, r, src, dst, protected=(), rows="sorted", distill=False):
        metric = metric.detach().double()
        self.tokens = metric.shape[0]
        length = (metric * metric).sum(-1).sqrt()
        scores = ((metric[:, None] * metric[None]).sum(-1) / (length[:, None] * length[None])).tolist()
        best = {}
        for i in src:
            best[i] = (-math.inf, None)
            for j in dst:
                if i in protected or j in protected:
                    continue
                if scores[i][j] > best[i][0]:
                    best[i] = (scores[i][j], j)
        ranked = sorted(src, key=lambda i: (-best[i][0], i))
        self.edges = [(i, best[i][1]) for i in ranked[:r]]
        self.scores = {i: best[i][0] for i, _ in self.edges}
        unmerged = ranked[r:] if rows == "ranked" else sorted(ranked[r:])
        order = [*unmerged, *dst]
        if distill:
            order = [*unmerged[:1], dst[0], *unmerged[1:], *dst[1:]]
        self.heads = order
        row = {head: n for n, head in enumerate(order)}
        self.row_of = [0] * self.tokens
        for head in order:
            self.row_of[head] = row[head]
        for i, j in self.edges:
            self.row_of[i] = row[j]

    def members(self):
        groups = [[] for _ in self.heads]
        for token, row in enumerate(self.row_of):
            groups[row].append(token)
        return groups

    def merge(self, x, size=None, mode="mean"):
        """Rows [M, D] and sizes [M] of x [N, D]."""
        x = x.double()
        size = torch.ones(self.tokens, dtype=torch.float64) if size is None else size.double()
        rows, sizes = [], []
        for head, group in zip(self.heads, self.members(), strict=True):
            total = sum(size[i] for i in group)
            if mode == "mean":
                rows.append(sum(size[i] * x[i] for i in group) / total)
            elif mode == "sum":
                rows.append(sum(x[i] for i in group))
            elif mode == "max":
                rows.append(torch.stack([x[i] for i in group]).amax(0))
            else:
                rows.append(x[head])
            sizes.append(total)
        return torch.stack(rows), torch.stack(sizes)

    def unmerge(self, y):
        return y[self.row_of]


def alternate(metric, r, class_token=False, distill_token=False):
    """ToMe's own choice of sources, destinations, clamp and row order."""
    n = metric.shape[0]
    protected = set()
    if class_token:
        protected.add(0)  # the first source
    if distill_token:
        protected.add(1)  # the first destination
    r = max(min(r, (n - len(protected)) // 2), 0)
    src, dst = list(range(0, n, 2)), list(range(1, n, 2))
    if r == 0:
        return None
    return Oracle(metric, r, src, dst, protected, "sorted" if class_token else "ranked", distill_token)

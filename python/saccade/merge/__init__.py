"""Token merging and visual-token compression: match, merge, unmerge, pool and prune video tokens."""

from saccade.merge import _fakes as _fakes
from saccade.merge.match import build_plan, match
from saccade.merge.merge import merge
from saccade.merge.partition import Alternate, Frames, Grid, Index, Partition, Random, Strided
from saccade.merge.plan import MergePlan
from saccade.merge.positions import merge_positions
from saccade.merge.unmerge import unmerge

__all__ = [
    "Alternate",
    "Frames",
    "Grid",
    "Index",
    "MergePlan",
    "Partition",
    "Random",
    "Strided",
    "build_plan",
    "match",
    "merge",
    "merge_positions",
    "unmerge",
]

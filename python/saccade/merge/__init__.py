"""Token merging and visual-token compression: match, merge, unmerge, pool and prune video tokens."""

from saccade.merge import _fakes as _fakes
from saccade.merge.dpc_knn import dpc_knn
from saccade.merge.match import build_plan, match
from saccade.merge.merge import merge
from saccade.merge.modules import TokenMerger
from saccade.merge.partition import Alternate, Frames, Grid, Index, Partition, Random, Strided
from saccade.merge.plan import MergePlan
from saccade.merge.pooling import pixel_shuffle, pixel_unshuffle, pool2d
from saccade.merge.positions import merge_positions
from saccade.merge.presets import TowerMerging, auroracap, tome, tomesd
from saccade.merge.presets_video import FrameFusion, Retention, evs, framefusion, ppllava, vidtome
from saccade.merge.prompt import PromptPool3d, prompt_pool3d
from saccade.merge.retention import keep_top, prune_pairs, retain, select
from saccade.merge.runs import merge_runs
from saccade.merge.schedule import MergeSchedule
from saccade.merge.similarity import frame_similarity, prompt_similarity, prompt_weights
from saccade.merge.static_windows import static_windows
from saccade.merge.unmerge import unmerge
from saccade.merge.video import VideoMerger, VideoPlan, compose

__all__ = [
    "Alternate",
    "FrameFusion",
    "Frames",
    "Grid",
    "Index",
    "MergePlan",
    "MergeSchedule",
    "Partition",
    "PromptPool3d",
    "Random",
    "Retention",
    "Strided",
    "TokenMerger",
    "TowerMerging",
    "VideoMerger",
    "VideoPlan",
    "auroracap",
    "build_plan",
    "compose",
    "dpc_knn",
    "evs",
    "frame_similarity",
    "framefusion",
    "keep_top",
    "match",
    "merge",
    "merge_positions",
    "merge_runs",
    "pixel_shuffle",
    "pixel_unshuffle",
    "pool2d",
    "ppllava",
    "prompt_pool3d",
    "prompt_similarity",
    "prompt_weights",
    "prune_pairs",
    "retain",
    "select",
    "static_windows",
    "tome",
    "tomesd",
    "unmerge",
    "vidtome",
]

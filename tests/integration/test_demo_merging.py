"""The merging page of `saccade demo`: its figures by a second way, every shape of clip, and the picture itself."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib")

from saccade import merge
from saccade.demo import measure, merging, merging_picture, merging_presets
from saccade.demo.merging_presets import PRESETS, SHARES, tome_plan
from saccade.demo.video import Clip

NAMES = ["tome", "auroracap", "tomesd", "vidtome", "framefusion", "evs", "ppllava"]


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """No repetitions, and the fixture's own times."""

    def time_calls(calls, *, budget=0.0, least=1):
        for call in calls:
            call()
        return [1e-3 * (n + 1) for n in range(len(calls))]

    monkeypatch.setattr(measure, "time_calls", time_calls)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these clips are too small for more
    yield
    torch.set_num_threads(threads)


def frames_of(count, height=56, width=84, seed=0):
    """A smooth picture that moves, some noise, and one hard cut."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(float)
    waves = [np.sin(x / (9 + c) + y / 13 + 0.4 * n + 3 * (n > count // 2)) for n in range(count) for c in range(3)]
    picture = np.stack(waves).reshape(count, 3, height, width).transpose(0, 2, 3, 1)
    return (127 + 90 * picture + draw.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)


def clip_of(frames, name="a clip.mkv"):
    count = len(frames)
    return Clip(Path(name), frames, tuple(n / 2 for n in range(count)), 0.5, count / 2, count, frames.shape[2:0:-1])


def size_of(png):
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_patches_are_the_frames_cut_up():
    patches, small = merging.patches_of(frames_of(3, 50, 75))
    t, h, w = patches.grid
    assert small.shape == (t, h * 14, w * 14, 3) and patches.count == t * h * w
    for frame, row, column in ((0, 0, 0), (1, 2, 3), (2, h - 1, w - 1)):
        part = small[frame, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14].astype(np.float32) / 255
        token = patches.pixels[0, (frame * h + row) * w + column].view(3, 14, 14)
        assert np.array_equal(token.permute(1, 2, 0).numpy(), part)
    # The colours are centred over the clip; the last entry is the same everywhere.
    assert patches.metric[0, :, :-1].mean(0).abs().max() < 1e-6
    assert patches.metric[0, :, -1].unique().numel() == 1


def test_every_preset_has_a_curve_and_the_errors_are_those_of_the_groups():
    study = merging.study(frames_of(4))
    assert [p.name for p in PRESETS] == NAMES and [t.point.preset for t in study.timed] == NAMES
    pixels = study.patches.pixels[0].double().numpy()
    spread = np.sqrt(((pixels - pixels.mean(0)) ** 2).mean())
    for name in NAMES:
        points = study.of(name)
        kept = [p.kept for p in points]
        assert kept == sorted(set(kept), reverse=True) and len(kept) > 1
        assert points[0].ratio == 1 and points[0].error == 0
        for point in points:
            row_of = point.made.row_of.numpy()
            assert row_of.min() == 0 and row_of.max() == point.kept - 1 and len(np.unique(row_of)) == point.kept
            assert point.ratio == point.kept / study.patches.count
            assert np.isfinite(point.error) and point.error >= 0
            if name in ("tome", "auroracap", "tomesd", "framefusion", "ppllava"):
                sums = np.zeros((point.kept, pixels.shape[1]))
                np.add.at(sums, row_of, pixels)
                held = np.bincount(row_of)
                if name == "ppllava" and not set(held) <= {math.prod(kernel) for kernel in merging_presets._WINDOWS}:
                    continue  # a remainder shows the mean of a window that it is not in
                means = (sums / held[:, None])[row_of]
                assert point.error == pytest.approx(np.sqrt(((means - pixels) ** 2).mean()) / spread, abs=1e-6), name
    errors = [p.error for p in study.of("tome")]
    assert len(errors) == len(SHARES) and errors == sorted(errors)
    assert all(check.ok for check in study.checks) and len(study.checks) == 2


def test_groups_only_grow_and_sizes_are_carried():
    patches, _ = merging.patches_of(frames_of(4, seed=1))
    stops = [patches.count // 2, patches.count // 4, patches.count // 10]
    plans = [tome_plan(patches.metric, stops[: n + 1]) for n in range(3)]
    for (fine, _), (coarse, _) in itertools.pairwise(plans):
        pairs = torch.stack((fine.inverse[0], coarse.inverse[0]), 1).unique(dim=0)
        assert len(pairs) == fine.rows, "a group came apart"
    for (plan, size), stop in zip(plans, stops, strict=True):
        assert plan.rows == stop and torch.equal(size[0, :, 0].int(), plan.ptr[0].diff())
        assert size.sum() == patches.count
    assert (plans[-1][0].inverse.view(4, -1).unique().numel()) == stops[-1]


def test_a_dropped_patch_is_shown_as_the_last_one_kept_there():
    study = merging.study(frames_of(4, seed=2))
    t, places = study.patches.grid[0], study.patches.places
    for point in study.of("evs"):
        kept = merge.keep_top(change(study.patches), point.kept)[0].tolist()
        row_of = point.made.row_of.tolist()
        for n in range(t * places):
            shown = next(m for m in range(n, -1, -places) if m in kept)
            assert row_of[n] == kept.index(shown)
    assert study.of("evs")[-1].kept == places


def change(patches):
    """[1, N]: how little each patch is like its place one frame before; the first frame counts most."""
    alike = merge.frame_similarity(patches.metric, patches.grid[0]).flatten(1)
    return torch.cat((torch.full((1, patches.places), torch.inf), 1 - alike), 1)


def test_a_wrong_plan_fails_the_checks(monkeypatch):
    made = merging_presets._tome

    def lossy(patches, rows):
        right = made(patches, rows)
        size = right.size.clone()
        size[0] += 1
        return merging_presets.Made(right.rows, right.row_of, size, right.merge, lambda y: right.unmerge(y) * 0.5)

    wrong = (merging_presets.Preset("tome", "", lossy), *PRESETS[1:])
    monkeypatch.setattr(merging, "PRESETS", wrong)
    assert [check.ok for check in merging.study(frames_of(2)).checks] == [False, False]


SHAPES = {
    "one frame": (1, 56, 84),
    "two small frames": (2, 2, 2),
    "an odd size": (3, 51, 37),
    "elongated": (4, 10, 700),
    "portrait": (5, 96, 40),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_clip_gets_its_page(tmp_path, shape):
    clip = clip_of(frames_of(*shape), "$cost$ of a very long name, longer than any line of the page would hold.mkv")
    study = merging.study(clip.frames)
    assert all(check.ok for check in study.checks) and {p.preset for p in study.points} == set(NAMES)
    width, height = size_of(merging_picture.draw(tmp_path / "merging.png", study, clip))
    assert width == 1650 and 900 < height < 3600
    if shape[0] == 1:  # nothing to merge along time
        assert all(len(study.of(name)) == 1 for name in ("vidtome", "framefusion", "evs"))
        assert len(study.of("tome")) > 5


@pytest.mark.parametrize("value", [0, 77])
def test_a_clip_of_one_colour(tmp_path, value):
    frames = np.full((4, 28, 56, 3), value, np.uint8)
    study = merging.study(frames)
    assert all(check.ok for check in study.checks)
    assert max(p.error for p in study.points) < 1e-4, "means of equal patches are those patches"
    if value == 77:
        size_of(merging_picture.draw(tmp_path / "merging.png", study, clip_of(frames)))


def test_what_result_json_says():
    study = merging.study(frames_of(2))
    said = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert (said["frames"], said["tokens"], said["patch"]) == (2, study.patches.count, 14)
    assert {line["preset"] for line in said["curve"]} == set(NAMES) and "RMS" in said["error_unit"]
    assert [line["preset"] for line in said["times"]] == NAMES
    assert all(set(line) == {"preset", "kept", "ratio", "error"} for line in said["curve"])
    assert (said["times"][0]["match_ms"], said["times"][0]["unmerge_ms"]) == (pytest.approx(1.0), pytest.approx(3.0))


def test_text_lies_apart(tmp_path):
    """No two pieces of text of the page overlap, and none leaves it."""
    from matplotlib.figure import Figure

    clip = clip_of(frames_of(4))
    boxes = []
    save = Figure.savefig
    of_clip = merging.study(clip.frames)

    def keep(figure, path):
        save(figure, path)
        renderer = figure.canvas.get_renderer()
        texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
        # Boxes reach from the tallest to the lowest letter that a font has: three pixels of that are air.
        boxes.extend((text.get_text(), text.get_window_extent(renderer).padded(-3)) for text in texts)
        boxes.append(("", figure.bbox))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        merging_picture.draw(tmp_path / "merging.png", of_clip, clip)
    _, page = boxes.pop()
    assert len(boxes) > 40
    for n, (text, box) in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
        assert not [other for other, its in boxes[:n] if box.overlaps(its)], text

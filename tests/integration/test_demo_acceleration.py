"""The acceleration part of `saccade demo`: its figures by a second way, checks that can fail, the tables and the page."""

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")
pytest.importorskip("transformers", minversion="5.19")

import saccade
from saccade.demo import acceleration, acceleration_picture, captioner, generator, levels, measure, report
from saccade.demo.acceleration import Line, Study
from saccade.demo.levels import LEVELS
from saccade.demo.video import Clip
from saccade.swap.presets import KEPT, SPARSE
from saccade.swap.tokens import tile_windows
from saccade.testing import same_state, state_of

KEEP = {"stock": 1.0, "lossless": 1.0, "balanced": KEPT["balanced"], "aggressive": KEPT["aggressive"]}


@pytest.fixture(autouse=True, scope="module")
def threads():
    """These models are too small for more than one."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def frames_of(count, height=56, width=84, seed=0):
    """A smooth picture that moves, with some noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(float)
    waves = [np.sin(x / (9 + c) + y / 13 + 0.4 * n) for n in range(count) for c in range(3)]
    picture = np.stack(waves).reshape(count, 3, height, width).transpose(0, 2, 3, 1)
    return (127 + 90 * picture + draw.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)


def clip_of(frames, name="a clip.mkv"):
    count = len(frames)
    return Clip(Path(name), frames, tuple(n / 2 for n in range(count)), 0.5, count / 2, count, frames.shape[2:0:-1])


def tiny():
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = captioner._small()
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    config.vision_config.depth = 2
    config.vision_config.fullatt_block_indexes = [1]
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def once(calls, *, budget=0.0, least=1):
    for call in calls:
        call()
    return [1e-3] * len(calls)


def small_load(load=generator.load):
    return load(layers=2)


@pytest.fixture(scope="module")
def models():
    clip = clip_of(frames_of(4))
    model = tiny()
    return model, captioner.inputs_of(model, clip), clip


@pytest.fixture(scope="module")
def done(models):
    """A study, with the number of steps that it told."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time_calls", once)
        patch.setattr(generator, "load", small_load)
        before = state_of(models[0])
        study = acceleration.study(*models, lambda: told.append(1))
    assert same_state(before, state_of(models[0])), "the model that was given is not touched"
    return study, len(told)


# ---- the latents and the float64 twin -----------------------------------------------------------------------------------
def test_latents_are_the_frames():
    """Of two clips that differ in one block of pixels the latents differ in that place alone, and the noise is half."""
    frames = frames_of(8, 192, 256)
    other = frames.copy()
    other[3, 80:88, 40:48] = 255 - other[3, 80:88, 40:48]
    one, two = (
        generator._latents(torch.from_numpy(f).permute(0, 3, 1, 2), torch.Generator().manual_seed(1))
        for f in (frames, other)
    )
    assert one.shape == (1, 16, 8, 24, 32)
    gap = (one - two).abs().amax((0, 1))
    assert gap.argmax() == (3 * 24 + 10) * 32 + 5 and gap.flatten().topk(2).values[1] < 0.05 * gap.max()
    torch.testing.assert_close(one.square().mean((0, 2, 3, 4)), torch.ones(16))
    sample = generator.sample_of(clip_of(frames))
    assert sample.grid == (8, 12, 16) and sample.frames == tuple(range(8)) and sample.timestep.tolist() == [500]
    rest = sample.latents - 0.5 * one
    assert float(rest.std()) == pytest.approx(0.5, abs=0.01) and abs(float((rest * one).mean())) < 0.01
    assert torch.equal(sample.latents, generator.sample_of(clip_of(frames)).latents)


SIZES = [(2, 2), (4, 640), (640, 4), (48, 64), (240, 320), (360, 640), (640, 640), (101, 57), (30, 500)]


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_clip_gives_a_grid_on_which_the_levels_differ(count, size):
    sample = generator.sample_of(clip_of(np.zeros((count, *size, 3), np.uint8)))
    grid = sample.grid
    assert sample.latents.shape == (1, 16, grid[0], 2 * grid[1], 2 * grid[2]) and sample.latents.isfinite().all()
    assert max(grid) <= 256 and 1500 <= math.prod(grid) <= 7000
    assert len(sample.frames) == grid[0] and list(sample.frames) == sorted(sample.frames)
    assert set(sample.frames) == set(range(count))
    tile = [min(a, b) for a, b in zip((4, 8, 8), grid, strict=True)]
    counts = [-(-a // b) for a, b in zip(grid, tile, strict=True)]
    shares = [math.prod(tile_windows(grid, tile, SPARSE[level][2])) for level in ("balanced", "aggressive")]
    assert math.prod(counts) > shares[0] > shares[1]


def test_the_twin_is_float64_throughout():
    """No large tensor of another dtype is made on the way, and leaving out a part of it gives a larger error."""
    model, sample = small_load(), generator.sample_of(clip_of(frames_of(2)))
    small = replace(sample, latents=sample.latents[:, :, :2])
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() > 10_000 and not str(func).startswith("aten._to_copy"):
                seen.add(out.dtype)
            return out

    angles = generator._angles(model.rope)
    torch.testing.assert_close(angles.cos(), model.rope.freqs_cos.double(), rtol=0, atol=1e-7)
    true = generator.exact_forward(model, small)
    twin = copy.deepcopy(model).double()
    with torch.no_grad(), generator._KeepDouble(), Watch():
        near = generator.forward(twin, small)
    assert seen == {torch.float64}
    naive, stock = generator.forward(twin, small).detach(), generator.forward(model, small).detach()
    errors = [float((x.double() - true).abs().max()) for x in (near, naive, stock)]
    # `near` has fp32 tables; transformers' own double also goes through fp32 in every block.
    assert 0 < errors[0] < errors[1] < errors[2] < 1e-5


# ---- the study --------------------------------------------------------------------------------------------------------------
def test_everything_passes_and_is_told(done):
    study, told = done
    assert told == acceleration.STEPS
    assert all(check.ok for check in study.checks), study.checks
    assert len(study.checks) == 9 and len({check.name for check in study.checks}) == 9
    for lines in (study.captioner, study.generator):
        assert [line.level for line in lines] == list(LEVELS)
        assert lines[0].sites == 0 and all(line.sites > 0 for line in lines[1:])
        assert lines[0].change == 0 < lines[1].change < 1e-5 < lines[2].change < lines[3].change
        for line in lines:
            assert sum(s for part, s in line.seconds.items() if part != "whole") == pytest.approx(line.seconds["whole"])
            assert all(seconds > 0 for seconds in line.seconds.values())
    assert set(study.captioner[0].seconds) == {"vision tower", "language model", "rest", "whole"}
    assert study.captioner[1].same == 1


def test_the_tokens_are_those_of_the_recipes(models, done):
    _, inputs, _ = models
    study, _ = done
    count = math.prod(study.visual)
    for line in study.captioner:
        kept = round(KEEP[line.level] * count)
        assert line.kept == inputs.ids.shape[1] - count + kept
        groups = study.groups[line.level]
        assert groups.shape == study.visual and groups.unique().tolist() == list(range(kept))


@pytest.mark.parametrize("level", ["balanced", "aggressive"])
def test_drawn_groups_are_what_enters_the_language_model(models, done, level):
    """The rows of the first layer are the means of the groups, in some order."""
    model, inputs, _ = models
    model = copy.deepcopy(model)
    seen = {}
    text = model.model.language_model
    text.register_forward_pre_hook(lambda m, a, k: seen.update(embeds=k["inputs_embeds"]), with_kwargs=True)
    text.layers[0].register_forward_pre_hook(
        lambda m, a, k: seen.update(rows=a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad(), saccade.accelerated(model, level):
        captioner.forward(model, inputs)
    groups = done[0].groups[level].flatten()
    start, count = inputs.segments[0], len(groups)
    embeds = seen["embeds"][0, start : start + count].double().numpy()
    means = np.stack([embeds[groups.numpy() == g].mean(0) for g in range(int(groups.max()) + 1)])
    rows = seen["rows"][0, start : start + len(means)].double().numpy()
    assert seen["rows"].shape[1] == inputs.ids.shape[1] - count + len(means)
    order = [means[:, 0].argsort(), rows[:, 0].argsort()]
    np.testing.assert_allclose(rows[order[1]], means[order[0]], atol=1e-5 * np.abs(means).max())


@pytest.mark.parametrize("level", ["balanced", "aggressive"])
def test_drawn_views_are_what_attention_sees(done, level):
    """What is not seen may be anything; what is seen may not."""
    study, _ = done
    model, sample = small_load(), study.sample
    seen = study.seen[level].flatten()
    assert 0 < int(seen.sum()) < len(seen)
    t, h, w = sample.grid
    token = (study.query[0] * h + study.query[1]) * w + study.query[2]
    assert study.query == (t // 2, h // 2, w // 2) and seen[token]
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(1, len(seen), 256, generator=draw)
    with torch.no_grad(), saccade.accelerated(model, level, grid=sample.grid) as made:
        made.set_step(acceleration._STEP)
        generator.forward(model, sample)  # the root tells the sites which tokens come
        where = model.rope(sample.latents)

        def view(hidden):
            return model.blocks[-1].attn1(hidden, None, None, where)[0, token]

        first = view(x)
        other = torch.where(seen[None, :, None], x, torch.randn(x.shape, generator=draw))
        assert torch.equal(view(other), first)
        near = seen.nonzero().flatten()[::97]
        for place in near[near != token][:5]:
            moved = x.clone()
            moved[0, place] += 30
            assert not torch.equal(view(moved), first), int(place)
        density = [1.0 if own is None else float(own.to_mask().float().mean()) for own in acceleration._layouts(model)]
    line = next(line for line in study.generator if line.level == level)
    # Blocks hold more than the tokens that are seen in them.
    assert sum(density) / len(density) <= line.kept < 1
    assert density[0] == (1 if SPARSE[level][1] else density[1])


# ---- each check can fail -------------------------------------------------------------------------------------------------
def failed(models, **patches):
    """Names of the checks that fail under patches of `levels.saccade`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time_calls", once)
        patch.setattr(generator, "load", lambda load=generator.load: load(layers=1))
        for name, value in patches.items():
            patch.setattr(levels.saccade, name, value)
        return {check.name for check in acceleration.study(*models).checks if not check.ok}


def test_a_lossless_that_loses_is_seen(models):
    accelerate = saccade.accelerate
    found = failed(models, accelerate=lambda m, level, **o: accelerate(m, "aggressive", **o))
    assert found == {"captioner, lossless", "generator, lossless", "first steps are dense", "each level keeps less"}


def test_levels_that_do_nothing_are_seen(models, monkeypatch):
    monkeypatch.setenv("SACCADE_DISABLE", "1")
    assert failed(models) == {"captioner's swapped sites", "generator's swapped sites", "each level keeps less"}


def test_sparse_first_steps_and_what_is_left_behind_are_seen(models):
    accelerate = saccade.accelerate
    rules = [{"kernel": "rotary", "family": "wan"}, {"kernel": "sliding_tile", "family": "wan"}]

    def always_sparse(model, level, **options):
        wan = type(model).__name__.startswith("Wan") and level in ("balanced", "aggressive")
        return accelerate(model, {"rules": rules} if wan else level, **options)

    found = failed(models, accelerate=always_sparse, restore=lambda model: None)
    assert found == {"first steps are dense", "each level keeps less", "captioner restored", "generator restored"}


def test_a_state_shows_what_was_left_behind():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    before = state_of(model)
    assert same_state(before, state_of(model))
    hook = model[0].register_forward_hook(lambda *_: None)
    assert not same_state(before, state_of(model))
    hook.remove()
    assert same_state(before, state_of(model))
    model[0].forward = model[0].forward
    assert not same_state(before, state_of(model))
    del model[0].forward
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().clone())
    assert not same_state(before, state_of(model))


def test_copies_share_their_weights(models):
    model, inputs, _ = models
    with torch.no_grad():
        found = levels.variants(model, lambda one: captioner.forward(one, inputs))
    tensors = [[t.data_ptr() for t in itertools.chain(v.model.parameters(), v.model.buffers())] for v in found]
    assert all(pointers == tensors[0] for pointers in tensors) and len({id(v.model) for v in found}) == len(LEVELS)


def test_parts_are_timed_and_hooks_removed(monkeypatch):
    import time

    class Slow(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.02)
            return x

    model = torch.nn.Sequential(Slow(), Slow(), torch.nn.Identity())
    variant = levels.Variant("stock", model, state_of(model))
    monkeypatch.setattr(measure, "time_calls", lambda calls, budget: [call() for call in calls for _ in range(3)])
    levels.time_parts(
        [variant], lambda m: m(torch.zeros(1)), {"both": lambda m: list(m[:2]), "none": lambda m: [m[2]]}, 1.0
    )
    assert variant.seconds["both"] > 0.04 > 0.02 > variant.seconds["rest"] and variant.seconds["none"] < 0.01
    assert same_state(variant.before, state_of(model))


# ---- what is shown -------------------------------------------------------------------------------------------------------
def test_what_result_json_says(done):
    study, _ = done
    said = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert said["captioner"]["visual_tokens"] == list(study.visual) and said["generator"]["denoising_step"] == 20
    for part in ("captioner", "generator"):
        assert [line["level"] for line in said[part]["levels"]] == list(LEVELS)
        assert all(
            set(line) == {"level", "sites", "seconds", "kept", "change", "same"} for line in said[part]["levels"]
        )


def made_up(visual=(2, 2, 3), clip_frames=4, size=(56, 84), seconds=1.0):
    """A study of any shape, without models."""
    clip = clip_of(
        frames_of(clip_frames, *size), "$cost$ of a very long name, longer than any line of the page holds.mkv"
    )
    sample = generator.sample_of(clip)
    t, h, w = sample.grid
    study = Study(visual, sample, (t // 2, h // 2, w // 2))
    count = math.prod(visual)
    draw = torch.Generator().manual_seed(0)
    for n, level in enumerate(LEVELS):
        kept = max(1, round(KEEP[level] * count))
        row = torch.cat((torch.arange(kept), torch.randint(kept, (count - kept,), generator=draw)))
        study.groups[level] = row[torch.randperm(count, generator=draw)].view(visual)
        seen = torch.rand(t, h, w, generator=draw) < (1.0, 1.0, 0.3, 0.1)[n]
        study.seen[level] = seen
        parts = {"vision tower": 0.5, "language model": 0.4 / (n + 1), "rest": 0.1}
        own = {"self-attention": 0.6 / (n + 1), "rest": 0.4}
        for lines, times, words in ((study.captioner, parts, 0.5), (study.generator, own, None)):
            times = {part: value * seconds for part, value in times.items()}
            times["whole"] = sum(times.values())
            lines.append(Line(level, 5 * bool(n), times, 12345 if words else KEEP[level], 0.1 * n**3, words))
    return study, clip


@pytest.mark.parametrize("seconds", [3e-4, 0.777, 0.99999, 99.9])
def test_the_tables_fit_in_80_columns(seconds):
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in report._acceleration_tables(made_up(seconds=seconds)[0].to_dict()):
        console.print(table)
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for words in ("speed-", "aggressive", "model", "self-", "12345", "change", "270.0%"):
        assert words in text
    for level in LEVELS:
        assert sum(f"│ {level} " in line for line in text.splitlines()) == 2, text  # nothing is wrapped


SHAPES = {
    "usual": ((4, 8, 10), 8, (240, 320)),
    "small": ((1, 2, 2), 2, (2, 2)),
    "elongated": ((2, 1, 90), 4, (8, 640)),
    "portrait": ((3, 12, 4), 6, (96, 40)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_clip_gets_its_page_and_text_lies_apart(tmp_path, shape):
    from matplotlib.figure import Figure

    visual, frames, size = shape
    study, clip = made_up(visual, frames, size)
    boxes = []
    save = Figure.savefig

    def keep(figure, path):
        save(figure, path)
        renderer = figure.canvas.get_renderer()
        texts = [*figure.texts, *(text for axes in figure.axes for text in (*axes.texts, axes.title, axes._left_title))]
        # Boxes reach from the tallest to the lowest letter that a font has: three pixels of that are air.
        boxes.extend((t.get_text(), t.get_window_extent(renderer).padded(-3)) for t in texts if t.get_text())
        boxes.append(("", figure.bbox))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        content = acceleration_picture.draw(tmp_path / "a.png", study, clip).read_bytes()
    assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(content[n : n + 4], "big") for n in (16, 20))
    assert width == 1650 and 1200 < height < 3000
    _, page = boxes.pop()
    assert len(boxes) >= 30
    for n, (text, box) in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
        assert not [other for other, its in boxes[:n] if box.overlaps(its)], text

"""`saccade demo`: every kind of file a user may bring, and the table and picture at the end."""

import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
pytest.importorskip("transformers", minversion="5.19")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from saccade import demo  # noqa: E402
from saccade.demo import captioner, measure, report  # noqa: E402
from saccade.demo.clip import make_clip  # noqa: E402
from saccade.demo.errors import DemoError  # noqa: E402
from saccade.demo.patches import fit, patchify, resize  # noqa: E402
from saccade.demo.video import read_clip  # noqa: E402
from saccade.rope.presets import qwen_vision  # noqa: E402
from saccade.swap.transformers import _qwen_sources, qwen_rotary  # noqa: E402

RATE = 24


def pictures(count, height=48, width=64):
    """Frame n has brightness 8 + 2 n on the left and is dark on the right: it says which one it is, and which way up."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for n in range(count):
        frames[n, :, : width // 2] = 8 + 2 * n
    return frames


def number(frame):
    """Which frame of `pictures` this is, from the middle of its bright half."""
    height, width = frame.shape[:2]
    return round((float(frame[height // 4 : height // 2, width // 8 : width // 4].mean()) - 8) / 2)


def write(path, frames, *, codec="ffv1", pix_fmt="bgr0", times=None, rotation=0, aspect=None, gop=12, base=1000):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = stream.time_base = Fraction(1, base)
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for n, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = round((n / RATE if times is None else times[n]) * base)
            frame.time_base = Fraction(1, base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for n in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * n
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_the_clip_has_motion_and_one_hard_cut(tmp_path):
    clip = read_clip(make_clip(tmp_path / "clip.mp4"), most=96, rate=24)
    assert (clip.count, clip.size, clip.duration) == (96, (320, 240), pytest.approx(4.0))
    change = np.abs(np.diff(clip.frames.astype(int), axis=0)).mean((1, 2, 3))
    assert (change > 0.2).all(), "frames repeat"
    assert (change > 4 * np.median(change)).sum() == 1


def test_frames_come_from_where_they_should(tmp_path):
    clip = read_clip(write(tmp_path / "a.mkv", pictures(96)))
    assert clip.times == tuple(n / 2 for n in range(8))
    assert [number(frame) for frame in clip.frames] == [12 * n for n in range(8)]


def test_variable_frame_rate(tmp_path):
    times = [0.0, 0.1, 0.2, 2.0, 2.05, 3.0, 3.9, 3.95]
    clip = read_clip(write(tmp_path / "a.mkv", pictures(8), times=times))
    shown = [max(n for n, time in enumerate(times) if time <= moment + 1e-3) for moment in clip.times]
    assert [number(frame) for frame in clip.frames] == shown
    assert len(set(shown)) > 2


@pytest.mark.parametrize(("height", "width"), [(51, 37), (1, 64), (2, 2), (200, 33)])
def test_odd_sizes(tmp_path, height, width):
    clip = read_clip(write(tmp_path / "a.mkv", pictures(6, height, width)))
    assert clip.frames.shape[1:3] == (height, width)
    if max(height, width) >= 14:
        tall, wide = fit(height, width, most=100_000)
        assert tall % 28 == wide % 28 == 0


def test_grey_and_palette_free_formats(tmp_path):
    for pix_fmt in ("gray", "yuv444p10le"):
        clip = read_clip(write(tmp_path / f"{pix_fmt}.mkv", pictures(48), pix_fmt=pix_fmt))
        assert clip.frames.shape == (4, 48, 64, 3)
        found = [number(frame) for frame in clip.frames]
        assert found == pytest.approx([0, 12, 24, 36], abs=1.5)


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_rotation(tmp_path, turn):
    frames = pictures(8)
    clip = read_clip(write(tmp_path / "a.mp4", frames, codec="libx264", pix_fmt="yuv444p", rotation=turn))
    plain = read_clip(write(tmp_path / "b.mp4", frames, codec="libx264", pix_fmt="yuv444p"))
    assert clip.size == ((64, 48) if turn == 180 else (48, 64))
    # FFmpeg's display rotation is counter-clockwise, as numpy's.
    assert np.array_equal(clip.frames, np.rot90(plain.frames, turn // 90 % 4, axes=(1, 2)))
    dark = {90: np.s_[:, :16], 180: np.s_[:, :, :16], -90: np.s_[:, -16:]}[turn]
    bright = {90: np.s_[:, -16:], 180: np.s_[:, :, -16:], -90: np.s_[:, :16]}[turn]
    assert clip.frames[bright].mean() > clip.frames[dark].mean() + 3


def test_pixels_that_are_not_square(tmp_path):
    clip = read_clip(write(tmp_path / "a.mp4", pictures(8), codec="libx264", pix_fmt="yuv444p", aspect=Fraction(2, 1)))
    assert clip.size == (128, 48)


def test_two_frames(tmp_path):
    clip = read_clip(write(tmp_path / "a.mkv", pictures(2)))
    assert [number(frame) for frame in clip.frames] == [0, 1]
    assert clip.interval == pytest.approx(1 / RATE, rel=0.05)


def test_three_frames_give_an_even_number(tmp_path):
    assert len(read_clip(write(tmp_path / "a.mkv", pictures(3))).frames) == 2


def test_a_long_video_is_not_decoded_whole(tmp_path, monkeypatch):
    count = 3000
    frames = pictures(100)[np.arange(count) * 100 // count]
    path = write(tmp_path / "a.mkv", frames, codec="mpeg4", pix_fmt="yuv420p", gop=25)
    decoded = []
    from saccade.demo import video

    run = video._Frames.next

    def count_frames(self):
        found = run(self)
        decoded.append(found is not None)
        return found

    monkeypatch.setattr(video._Frames, "next", count_frames)
    clip = read_clip(path)
    assert clip.count == count and clip.duration == pytest.approx(count / RATE, rel=1e-3)
    assert sum(decoded) <= 8 * 26, "more than one group of pictures per sampled frame was decoded"
    expected = [int(moment * RATE + 1e-6) * 100 // count for moment in clip.times]
    assert [number(frame) for frame in clip.frames] == pytest.approx(expected, abs=1.01)


def test_large_frames_are_scaled_down(tmp_path):
    clip = read_clip(write(tmp_path / "a.mkv", pictures(4, 700, 1000)))
    assert clip.frames.shape[1:3] == (448, 640)


def cut_short(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def test_a_video_that_ends_early_is_used_up_to_there(tmp_path):
    path = cut_short(write(tmp_path / "a.mkv", pictures(96)), 0.6)
    clip = read_clip(path)
    assert 40 < clip.count < 80 and len(clip.frames) >= 4


def damaged(path):
    """An MP4 whose picture data are noise."""
    write(path, pictures(24), codec="libx264", pix_fmt="yuv420p")
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    content[start : start + length] = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8).tobytes()
    path.write_bytes(content)
    return path


def empty_stream(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return path


def text_file(path):
    path.write_text("this is not a video\n" * 50)
    return path


def no_bytes(path):
    path.write_bytes(b"")
    return path


def folder(path):
    path.mkdir()
    return path


BAD = {
    "missing": ("a.mp4", lambda path: path, "no such file"),
    "folder": ("a.mp4", folder, "is a folder"),
    "text": ("a.mp4", text_file, "cannot be read as a video"),
    "no bytes": ("a.mp4", no_bytes, "cannot be read as a video"),
    "no index": ("a.mp4", lambda p: cut_short(make_clip(p), 0.5), "cannot be read as a video"),
    "noise": ("a.mp4", damaged, "damaged"),
    "sound only": ("a.m4a", write_sound, "has sound but no picture"),
    "no frame": ("a.avi", empty_stream, "no frame|cannot be read as a video"),
    "one frame": ("a.mkv", lambda p: write(p, pictures(1)), "only one frame"),
    "a photograph": ("a.png", lambda p: write(p, pictures(1), codec="png", pix_fmt="rgb24"), "only one frame"),
    "elongated": ("a.mkv", lambda p: write(p, pictures(2, 2, 1200)), "too elongated"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_give_one_sentence(tmp_path, name, monkeypatch):
    file, make, match = BAD[name]
    path = make(tmp_path / file)
    monkeypatch.setattr(captioner, "load", lambda folder: tiny())
    with pytest.raises(DemoError, match=match) as caught:
        demo.run(path, tmp_path / "out")
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 160 + len(str(path))
    assert name == "elongated" or str(path) in sentence


def test_the_command_ends_with_2(tmp_path):
    command = [sys.executable, "-m", "saccade.cli", "demo", str(tmp_path / "none.mp4"), "--out", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "no such file" in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr


def test_a_bad_model_folder_and_a_bad_out(tmp_path):
    video = write(tmp_path / "a.mkv", pictures(2))
    with pytest.raises(DemoError, match=r"--model: .* is not a folder with a config\.json"):
        demo.run(video, tmp_path / "out", model=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DemoError, match=r"--model: expected the weights of a qwen2_5_vl, .* holds a llama"):
        demo.run(video, tmp_path / "out", model=tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DemoError, match=r"--model: .* cannot be read"):
        demo.run(video, tmp_path / "out", model=tmp_path)
    with pytest.raises(DemoError, match=r"--out: .* cannot be made"):
        demo.run(video, video / "out")


@pytest.mark.parametrize("shape", [(8, 240, 320), (3, 101, 57), (2, 30, 1000), (5, 8, 8), (4, 10, 2000)])
def test_patches_equal_those_of_transformers(shape):
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    most = 28 * 28 * 90
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor = Qwen2VLVideoProcessor(
        size={"shortest_edge": 56 * 56, "longest_edge": most}, cap_pixels_per_frame=False, do_sample_frames=False
    )
    expected = processor(torch.from_numpy(frames).permute(0, 3, 1, 2), return_tensors="pt")
    pixels, grid = patchify(resize(frames, fit(*shape[1:], most=most)))
    assert torch.equal(grid, expected["video_grid_thw"])
    assert torch.equal(pixels, expected["pixel_values_videos"])


def tiny():
    """The demo's captioner with fewer layers, so that a test takes seconds."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = captioner._small()
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    config.vision_config.depth = 2
    config.vision_config.fullatt_block_indexes = [1]
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture
def quick(monkeypatch):
    """A short run: a small model, no compiler, no repetitions."""
    monkeypatch.setattr(captioner, "load", lambda folder: tiny())
    monkeypatch.setattr(measure, "_compile", lambda function, arguments: (None, "no working C++ compiler"))

    def once(calls, *, budget=0.0, least=1):
        for call in calls:
            call()
        return [1e-3 * (n + 1) for n in range(len(calls))]

    monkeypatch.setattr(measure, "time_calls", once)


def test_table_picture_and_result(tmp_path, quick, capsys):
    video = write(tmp_path / "my video.mkv", pictures(4, 60, 80))
    assert demo.run(video, tmp_path / "a" / "b") == 0
    out = capsys.readouterr().out
    for words in (
        "vision rotary",
        "text rotary",
        "captioner forward",
        "no working",
        "speed-up",
        "22 of 22 checks passed",
        "framefusion",
        "tokens are conserved",
    ):
        assert words in out, out
    assert "✗" not in out
    result = json.loads((tmp_path / "a" / "b" / "result.json").read_text())
    assert [row["name"] for row in result["rows"]][-1] == "forward + backward"
    assert all(check["ok"] for check in result["checks"]) and len(result["checks"]) == 22
    assert result["clip"]["frames"] == 4 and result["saccade_ran"] in ("cpu", "reference")
    assert {line["preset"] for line in result["merging"]["curve"]} >= {"tome", "vidtome", "evs", "ppllava"}
    for name in ("picture.png", "merging.png"):
        assert (tmp_path / "a" / "b" / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / "a" / "b" / name) in out.replace("\n", "")


def test_a_fault_in_the_rotation_is_seen(tmp_path, quick, capsys, monkeypatch):
    monkeypatch.setattr(qwen_rotary, "vision_spec", lambda tower: qwen_vision(80, 5000.0))
    monkeypatch.setattr(qwen_rotary, "frequencies_reason", lambda rotary, spec: None)
    assert demo.run(write(tmp_path / "a.mkv", pictures(2, 112, 140)), tmp_path) == 1
    out = capsys.readouterr().out
    for name in ("logits, fp32", "gradients, fp32", "logits, float64", "logits with HoPE"):
        assert f"✗ {name}" in out, out
    assert "✗ text rotary" not in out and "22 of 22" not in out


def test_weights_from_a_folder(tmp_path, quick, monkeypatch):
    model = tiny()
    model.save_pretrained(tmp_path / "weights")
    monkeypatch.undo()
    loaded = captioner.load(tmp_path / "weights")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    monkeypatch.setattr(captioner, "_memory", lambda: 1000)
    with pytest.raises(DemoError, match=r"--model: .* GiB of memory"):
        captioner.load(tmp_path / "weights")


def test_an_unknown_transformers(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(DemoError, match=r"needs transformers 5\.19 or newer, 4\.57\.6 is installed"):
        captioner.load(None)
    monkeypatch.undo()
    monkeypatch.setattr(_qwen_sources, "_TESTED", {})
    with pytest.raises(DemoError, match=r"Saccade does not know this model: .* has an untested source"):
        captioner.load(None)


def test_the_clip_goes_through_the_real_positions(tmp_path):
    clip = read_clip(make_clip(tmp_path / "clip.mp4"))
    inputs = captioner.inputs_of(tiny(), clip)
    before, (t, h, w), after = inputs.segments
    assert (t, h, w) == (4, 8, 10) and inputs.ids.shape[1] == before + t * h * w + after
    assert inputs.seconds_per_step == pytest.approx(1.0)
    assert inputs.positions[0, 0, before :: h * w][:t].tolist() == [before + 2 * n for n in range(t)]


def test_times_take_turns_and_count():
    order = []
    times = measure.time_calls([lambda: order.append("a"), lambda: order.append("b")], budget=0.0, least=3)
    assert order == ["a", "b"] * 3 and all(math.isfinite(t) and t >= 0 for t in times)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(2.345, "2.35 s"), (0.0123, "12.3 ms"), (0.99999, "1000 ms"), (4.5e-7, "0.45 µs"), (75.2, "75.2 s")],
)
def test_durations(seconds, shown):
    assert report.duration(seconds) == shown

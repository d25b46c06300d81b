"""`saccade demo`: a captioner and a generator on a clip, stock against Saccade, with tables and pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.demo.errors import DemoError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DemoError", "run"]


def _folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out: {out} cannot be made ({error.strerror})") from error
    if not os.access(out, os.W_OK):
        raise DemoError(f"--out: {out} may not be written")


def run(video: Path | None, out: Path, *, model: Path | None = None, gamma: float = 1.5) -> int:
    """Run the demo and write its files to `out`.

    Args:
        video: any video file; None makes a clip of photographs.
        out: folder for picture.png, merging.png, acceleration.png, result.json and the clip; made where missing.
        model: folder with weights of a Qwen2.5-VL; None takes random ones, always the same.
        gamma: temporal stride of HoPE.

    Returns:
        0 where every check passes, 1 otherwise.

    Raises:
        DemoError: a file that cannot be used, in one sentence.
    """
    from rich.console import Console

    _folder(out)
    return _run(Console(), video, out, model, gamma)


def _run(console: Console, video: Path | None, out: Path, folder: Path | None, gamma: float) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from saccade.demo.video import read_clip

    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def task(name: str, steps: int) -> Callable[[], None]:
            number = progress.add_task(name, total=steps)
            return lambda: progress.advance(number)

        step = task("reading the video", 1)
        if video is None:
            from saccade.demo.clip import make_clip

            video = make_clip(out / "clip.mp4")
            files = [video]
        else:
            files = []
        clip = read_clip(video)
        step()

        step = task("loading transformers and the model", 2)
        from saccade.demo import captioner

        model = captioner.load(folder)
        step()
        inputs = captioner.inputs_of(model, clip, folder)
        step()

        from saccade.demo import (
            acceleration,
            acceleration_picture,
            checks,
            measure,
            merging,
            merging_picture,
            picture,
            report,
        )

        step = task("checking logits and gradients", 6)
        results = checks.check_all(model, inputs, gamma, step)
        step = task("compiling and timing the ops", 2)
        rows = measure.op_rows(model, inputs, step)
        step = task("timing the captioner", 2)
        rows.append(measure.whole_row("captioner forward", model, inputs, results.logits, gradients=False))
        step()
        rows.append(measure.whole_row("forward + backward", model, inputs, results.gradients, gradients=True))
        step()
        study = merging.study(clip.frames, task("merging the clip's tokens", merging.STEPS))
        levels = acceleration.study(model, inputs, clip, task("accelerating both models", acceleration.STEPS))
        step = task("drawing", 3)
        files.append(picture.draw(out / "picture.png", model, clip, inputs, gamma))
        step()
        files.append(merging_picture.draw(out / "merging.png", study, clip))
        step()
        files.append(acceleration_picture.draw(out / "acceleration.png", levels, clip))
        step()
    source = "seeded random weights" if folder is None else str(folder)
    about = report.facts(clip, inputs, model, source, measure.implementation(model, inputs), study, levels)
    verdicts = (
        [checks.of_row(row) for row in rows if row.budget is not None] + results.checks + study.checks + levels.checks
    )
    files.append(report.write(out / "result.json", about, rows, verdicts))
    report.show(console, about, rows, verdicts)
    for path in files:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0 if all(check.ok for check in verdicts) else 1

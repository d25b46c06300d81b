"""The `saccade` command."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_NEEDED = {"typer": "cli", "rich": "cli"}
_DEMO = ("av", "skimage", "matplotlib", "transformers", "diffusers")


def _require(modules: tuple[str, ...], extra: str) -> None:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        sys.exit(f"saccade: {', '.join(missing)} not installed; run: pip install 'saccade[{extra}]'")


def main() -> None:
    """Entry point of the console script."""
    _require(tuple(_NEEDED), "cli")
    import typer
    from rich.console import Console

    app = typer.Typer(
        add_completion=False, no_args_is_help=True, help="Kernels that make video models look only where it matters."
    )

    @app.command()
    def doctor() -> None:
        """What is installed, what this machine can run, and why the rest cannot."""
        from saccade import doctor as command

        raise typer.Exit(command.run(Console()))

    @app.command()
    def demo(
        video: Path = typer.Argument(None, help="A video file; without one the demo makes its own clip."),
        out: Path = typer.Option(Path("out/demo"), "--out", help="Folder for the pictures, the clip and result.json."),
        model: Path = typer.Option(
            None, "--model", help="Folder of Qwen2.5-VL weights; without it, seeded random ones."
        ),
    ) -> None:
        """A captioner and a generator on a clip, stock against Saccade: times, errors, and pictures of what is left out."""
        _require(_DEMO, "demo")
        from saccade import demo as command

        try:
            code = command.run(video, out, model=model)
        except command.DemoError as error:
            Console(stderr=True).print(f"saccade demo: {error}", style="red", highlight=False)
            raise typer.Exit(2) from error
        raise typer.Exit(code)

    @app.command("plan")
    def plan_command(
        model: str = typer.Argument(
            help="Folder or config file of transformers or diffusers, a Hub name, or timm:NAME."
        ),
        recipe: str = typer.Option(
            "balanced", "--recipe", help="A preset (`saccade presets`) or the path of a JSON file."
        ),
        grid: str = typer.Option(None, "--grid", help="Tokens T,H,W of the video that the estimates assume."),
        text: int = typer.Option(None, "--text", help="Text tokens that they assume."),
        json_path: Path = typer.Option(None, "--json", help="Also write the report to this file."),
    ) -> None:
        """What `saccade.accelerate` would swap in a model, without weights and without touching anything."""
        from saccade.swap import command

        raise typer.Exit(command.plan(Console(), model, recipe, grid, text, json_path))

    @app.command("presets")
    def presets_command(
        name: str = typer.Argument(None, help="Print this preset's recipe as JSON."),
    ) -> None:
        """The recipes that come with Saccade."""
        from saccade.swap import command

        raise typer.Exit(command.presets(Console(), name))

    app()


if __name__ == "__main__":
    main()

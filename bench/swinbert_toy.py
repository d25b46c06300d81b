"""`python -m bench.swinbert_toy`: SwinBERT's learned mask from training to the block-sparse kernel, on a toy captioner.

Videos of two squares, one that moves and one that stays, become a caption which names both colours: to tell them apart, tokens must be
compared over frames. A small transformer over caption and video tokens trains with the soft mask, which all heads, layers and samples
share: first for the task alone, then with the sparsity loss. Its bias gradient is `sparse_attention`'s. At the end the mask is hardened and
runs as a layout, without a bias.

`--published` takes the published start, a normal distribution, and weight 0.5 of the loss. Then every video token sees itself alone from
the first step, and no word of the task reaches the mask. The default starts where the bias is within reach of the softmax. `--full` is
SwinBERT's size, 50 + 784 tokens.

What is kept is scattered: blocks of 64 are nearly all touched though few pairs are seen. The table says both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from saccade.attention import BlockLayout, sparse_attention
from saccade.attention.learned import LearnedSparseMask, MaskDensity

Tensor = torch.Tensor
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
COLOURS = ("red", "green", "blue", "yellow")
WORDS = ("<pad>", "<s>", "</s>", "the", "square", "moves", "stays", *COLOURS)
IDS = {word: n for n, word in enumerate(WORDS)}
CAPTION = ("<s>", "the", "{moves}", "square", "moves", "the", "{stays}", "square", "stays", "</s>")
NAMED = (1, 5)  # inputs whose next word is a colour


@dataclass(frozen=True)
class Settings:
    """Sizes and training."""

    grid: tuple[int, int, int] = (16, 4, 4)
    text: int = 9  # inputs of a caption; more are padding
    layers: int = 2
    heads: int = 1
    batch: int = 16
    steps: int = 300
    init: float | None = 8.0  # of the mask; None: normal
    sparsity: float | None = None  # weight of the loss; None: 10 L, at which it and the task balance
    block: int = 64
    impl: str = "auto"
    seed: int = 0

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w


FULL = Settings(grid=(16, 7, 7), text=50, batch=4, steps=240)


@dataclass(frozen=True)
class State:
    """Loss and accuracy on videos not trained on."""

    loss: float
    moves: float  # share of captions that name the right colour
    stays: float


@dataclass(frozen=True)
class Outcome:
    settings: Settings
    start: State
    dense: State  # before the sparsity loss
    soft: State
    hard: State  # by the layout
    before: MaskDensity
    after: MaskDensity
    change: float  # of the logits, hard against soft: norm of the difference over norm
    layout_error: float  # the same, layout against hard bias over all blocks
    forward_ms: tuple[float, float]  # soft with its bias, hard by its layout
    seconds: float
    layout: BlockLayout


def scenes(count: int, settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Videos [n, T*H*W, colours] and captions [n, words]."""
    t, h, w = settings.grid
    video = 0.3 * torch.randn(count, t, h, w, len(COLOURS), generator=generator)
    moves = torch.randint(len(COLOURS), (count,), generator=generator)
    stays = (moves + torch.randint(1, len(COLOURS), (count,), generator=generator)) % len(COLOURS)
    direction = torch.randint(4, (count,), generator=generator)
    velocity = torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0]])[direction]
    n = torch.arange(count)
    for colour, speed in ((moves, 1), (stays, 0)):
        y, x = (torch.randint(size, (count,), generator=generator) for size in (h, w))
        for frame in range(t):
            for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                row, column = y + dy + frame * speed * velocity[:, 0], x + dx + frame * speed * velocity[:, 1]
                video[n, frame, row % h, column % w, colour] += 2
    named = {"{moves}": moves + IDS[COLOURS[0]], "{stays}": stays + IDS[COLOURS[0]]}
    words = [named.get(word, torch.full((count,), IDS.get(word, 0))) for word in CAPTION]
    return video.flatten(1, 3), torch.stack(words, 1)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Captioner(nn.Module):
    """Next word at every caption token, from the caption up to it and the whole video."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = 64 * settings.heads
        self.video, self.word = nn.Linear(len(COLOURS), width), nn.Embedding(len(WORDS), width)
        self.place = nn.Parameter(0.3 * torch.randn(settings.text, width))
        self.axes = nn.ParameterList(nn.Parameter(0.5 * torch.randn(size, width)) for size in settings.grid)
        self.layers = nn.ModuleList(Layer(width, settings.heads) for _ in range(settings.layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(WORDS)))

    def forward(self, video: Tensor, words: Tensor, attend: Attend) -> Tensor:
        t, h, w = self.axes
        where = (t[:, None, None] + h[:, None] + w).flatten(0, 2)
        x = torch.cat((self.word(words) + self.place, self.video(video) + where), 1)
        for layer in self.layers:
            x = layer(x, attend)
        out: Tensor = self.head(x[:, : len(self.place)])
        return out


class Trial:
    def __init__(self, settings: Settings) -> None:
        if settings.text < len(CAPTION) - 1:
            raise ValueError(f"text: expected at least the {len(CAPTION) - 1} inputs of a caption, got {settings.text}")
        torch.manual_seed(settings.seed)
        self.settings, self.generator = settings, torch.Generator().manual_seed(settings.seed + 1)
        self.mask = LearnedSparseMask(settings.tokens, init=settings.init)
        self.model = Captioner(settings)
        self.frame = self.mask.layout(settings.text, learned=False, block=settings.block)
        self.held_out = scenes(128, settings, torch.Generator().manual_seed(settings.seed + 2))

    def soft(self) -> Attend:
        """One bias, shared by all layers: their gradients meet in it."""
        bias = self.mask(self.settings.text)
        return lambda q, k, v: sparse_attention(q, k, v, self.frame, bias=bias, impl=self.settings.impl)

    def hard(self) -> Attend:
        layout = self.mask.layout(self.settings.text, block=self.settings.block)
        return lambda q, k, v: sparse_attention(q, k, v, layout, impl=self.settings.impl)

    def logits(self, video: Tensor, captions: Tensor, attend: Attend) -> Tensor:
        spare = self.settings.text - (len(CAPTION) - 1)
        out: Tensor = self.model(video, F.pad(captions[:, :-1], (0, spare), value=IDS["<pad>"]), attend)
        return out[:, : len(CAPTION) - 1]

    def train(self, steps: int, sparsity: float) -> None:
        # The second group steps by the sign of its gradient nearly alone: the sparsity loss gives 1e-8 a pair.
        groups = [
            {"params": self.model.parameters(), "lr": 2e-3},
            {"params": self.mask.parameters(), "lr": 0.1, "eps": 1e-14},
        ]
        optimiser = torch.optim.Adam(groups)
        for _ in range(steps):
            video, captions = scenes(self.settings.batch, self.settings, self.generator)
            logits = self.logits(video, captions, self.soft())
            loss = F.cross_entropy(logits.flatten(0, 1), captions[:, 1:].flatten())
            (loss + sparsity * self.mask.sparsity_loss()).backward()
            optimiser.step()
            optimiser.zero_grad()

    @torch.no_grad()
    def judge(self, attend: Attend) -> tuple[State, Tensor]:
        video, captions = self.held_out
        logits = torch.cat(
            [self.logits(v, c, attend) for v, c in zip(video.split(32), captions.split(32), strict=True)]
        )
        right = (logits.argmax(-1) == captions[:, 1:]).float().mean(0)
        loss = F.cross_entropy(logits.flatten(0, 1), captions[:, 1:].flatten())
        return State(float(loss), *(float(right[n]) for n in NAMED)), logits

    @torch.no_grad()
    def forward_ms(self, attend: Attend) -> float:
        video, captions = (x[: self.settings.batch] for x in self.held_out)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            self.logits(video, captions, attend)
            times.append(time.perf_counter() - start)
        return 1e3 * sorted(times)[2]


def run(settings: Settings) -> Outcome:
    """Train, sparsify, harden, measure."""
    begun = time.perf_counter()
    trial = Trial(settings)
    pull = 10.0 * settings.tokens if settings.sparsity is None else settings.sparsity
    with torch.no_grad():
        start, _ = trial.judge(trial.soft())
        before = trial.mask.density(settings.text, block=settings.block)
    trial.train(settings.steps // 3, 0.0)
    with torch.no_grad():
        dense, _ = trial.judge(trial.soft())
    trial.train(settings.steps - settings.steps // 3, pull)
    with torch.no_grad():
        soft_attend, hard_attend = trial.soft(), trial.hard()
        soft, soft_logits = trial.judge(soft_attend)
        hard, hard_logits = trial.judge(hard_attend)
        after = trial.mask.density(settings.text, block=settings.block)
        times = trial.forward_ms(soft_attend), trial.forward_ms(hard_attend)
        trial.mask.harden()
        _, biased = trial.judge(trial.soft())
    return Outcome(
        settings,
        start,
        dense,
        soft,
        hard,
        before,
        after,
        change=float((hard_logits - soft_logits).norm() / soft_logits.norm()),
        layout_error=float((hard_logits - biased).norm() / biased.norm()),
        forward_ms=times,
        seconds=time.perf_counter() - begun,
        layout=trial.mask.layout(settings.text, block=settings.block),
    )


def table(outcome: Outcome) -> object:
    from rich.table import Table

    s = outcome.settings
    video = " x ".join(map(str, s.grid))
    out = Table(
        title=f"SwinBERT's mask on a toy: {s.text} + {s.tokens} tokens ({video}), {s.layers} layers, {s.heads} x 64, {s.steps} steps",
        caption=f"Hard against soft: logits change by {outcome.change:.1e}; layout against hard bias: {outcome.layout_error:.1e}. "
        f"{outcome.seconds:.0f} s in all.",
    )
    for name in ("", "start", "task alone", "sparse, soft", "hard, by layout"):
        out.add_column(name, justify="left" if not name else "right")
    states = (outcome.start, outcome.dense, outcome.soft, outcome.hard)
    out.add_row("loss", *(f"{x.loss:.3f}" for x in states))
    out.add_row("names the square that moves", *(f"{100 * x.moves:.0f} %" for x in states))
    out.add_row("names the square that stays", *(f"{100 * x.stays:.0f} %" for x in states))
    out.add_section()
    b, a = outcome.before, outcome.after
    out.add_row("pairs of video tokens kept", f"{100 * b.kept:.1f} %", "", "", f"{100 * a.kept:.1f} %")
    out.add_row(f"blocks of {s.block} computed", f"{100 * b.blocks:.1f} %", "", "", f"{100 * a.blocks:.1f} %")
    out.add_row("pairs neither seen nor hidden", f"{100 * b.between:.1f} %", "", f"{100 * a.between:.1f} %", "0 %")
    out.add_row("forward, ms", "", "", *(f"{ms:.1f}" for ms in outcome.forward_ms))
    return out


def main(arguments: Sequence[str] | None = None) -> Outcome:
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m bench.swinbert_toy", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="SwinBERT's size, 50 + 784 tokens")
    parser.add_argument(
        "--published", action="store_true", help="normal start of the mask, weight 0.5 of the sparsity loss"
    )
    for name, kind in (
        ("steps", int),
        ("layers", int),
        ("heads", int),
        ("batch", int),
        ("block", int),
        ("seed", int),
        ("sparsity", float),
    ):
        parser.add_argument(f"--{name}", type=kind, default=None)
    parser.add_argument("--impl", default=None, help="implementation of the attention; auto")
    parser.add_argument("--picture", type=Path, default=None, help="write a picture of the layout")
    given = parser.parse_args(arguments)
    settings = FULL if given.full else Settings()
    if given.published:
        settings = replace(settings, init=None, sparsity=0.5)
    named = ("steps", "layers", "heads", "batch", "block", "seed", "sparsity", "impl")
    settings = replace(settings, **{n: getattr(given, n) for n in named if getattr(given, n) is not None})
    outcome = run(settings)
    Console(width=110).print(table(outcome))
    if given.picture is not None:
        share = f"{100 * outcome.after.kept:.1f} % of the pairs of video tokens are kept"
        outcome.layout.plot(grid=settings.grid, prefix=settings.text, title=share, path=given.picture)
    return outcome


if __name__ == "__main__":
    main()

"""`python -m bench.timm_vit`: whole ViTs of timm with merged tokens beside the same models without.

The ideal is the ratio of the blocks' FLOPs (`MergeSchedule.flops_ratio`), which counts neither the matching nor the patch embedding;
measured over ideal says how much of it arrives. `free` is what the machine gives for these shapes: the same model with its last tokens
cut off where it would merge, so matching, merging and bias cost nothing. Few tokens are slower each, and no merging is faster than that.
Weights are random: tokens of noise merge as fast as those of pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import report
from bench.cases import Call, Check
from bench.timing import CudaTimer, Effort, time_cpu
from bench.whole import begin, check_options, options_of, save
from saccade.merge import MergeSchedule
from saccade.swap.timm import merge_tokens
from saccade.testing import twin

MODELS = ("vit_base_patch16_224", "vit_base_patch16_384", "vit_large_patch16_224", "vit_large_patch16_384")
AMOUNTS = (4, 8, 13)
WANTED = 0.9
HEADINGS = (
    "model",
    "batch",
    "r",
    "tokens",
    "ms",
    "p20..p80",
    "stock ms",
    "ideal",
    "free",
    "measured",
    "of ideal",
    "note",
)


@dataclass
class Result:
    """One model, batch and r; r = 0 is the model as it is."""

    model: str
    batch: int
    r: int
    tokens_in: int
    tokens_out: int
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    n: int = 0
    stock_ms: float | None = None
    ideal: float | None = None
    free: float | None = None  # speed-up of cutting tokens off
    measured: float | None = None
    of_ideal: float | None = None
    status: str = "ok"
    reason: str = ""


def amounts(tokens: int, layers: int) -> list[int]:
    """r of each run: those of `AMOUNTS` that every layer can merge, else the most that it can."""
    most = (tokens - 2) // layers
    return list(dict.fromkeys(min(r, most) for r in AMOUNTS))


def cut(model: Any, schedule: MergeSchedule) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model with as many tokens in each layer as merging leaves, and no merging."""

    def run(x: torch.Tensor) -> torch.Tensor:
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for block, left in zip(model.blocks, schedule.tokens(x.shape[1]), strict=True):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            x = x[:, :left].contiguous()
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.forward_head(model.norm(x))  # type: ignore[no-any-return]

    return run


@torch.inference_mode()
def problem(stock: torch.nn.Module, merged: torch.nn.Module, x: torch.Tensor, tokens: int) -> str:
    """Why the merged model's times would not count, or nothing: the gate."""
    reference = stock(x)
    out = merged(x)
    features = merged.forward_features(x)  # type: ignore[operator]
    if features.shape[1] != tokens:
        return f"{features.shape[1]} tokens are left, the schedule says {tokens}"
    if not out.isfinite().all() or torch.equal(out, reference):
        return "the logits are not finite, or those of the stock model"
    same = twin(stock)
    with merge_tokens(same, 0):
        return "" if torch.equal(same(x), reference) else "r = 0 changes bits of the logits"


def measure(name: str, batch: int, device: str, effort: Effort, timer: CudaTimer | None) -> list[Result]:
    """Stock and all r of one model and batch, interleaved."""
    import timm

    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.float16
    stock = timm.create_model(name).eval().to(device, dtype)
    edge = stock.patch_embed.img_size[0]
    x = torch.randn(batch, 3, edge, edge, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    tokens = stock.patch_embed.num_patches + stock.num_prefix_tokens
    results: list[Result] = [Result(name, batch, 0, tokens, tokens)]
    calls: list[Callable[[torch.Tensor], Any]] = [stock]
    frees: list[Callable[[torch.Tensor], Any]] = []
    for r in amounts(tokens, len(stock.blocks)):
        model = twin(stock)
        schedule = merge_tokens(model, r).schedule
        left = schedule.tokens(tokens)[-1]
        ideal = 1 / schedule.flops_ratio(tokens, width=stock.embed_dim)
        result = Result(name, batch, r, tokens, left, ideal=ideal)
        result.reason = problem(stock, model, x[:1], left)
        result.status = "wrong" if result.reason else "ok"
        results.append(result)
        calls.append(model)
        frees.append(cut(stock, schedule))

    def call(model: Callable[[torch.Tensor], Any]) -> Call:
        run = torch.inference_mode()(lambda: model(x))
        run()
        return Call([run])

    ready = [call(model) for model in (*calls, *frees)]
    samples = time_cpu(ready, effort) if timer is None else timer.time(ready, effort)
    for result, sample in zip(results[1:], samples[len(results) :], strict=True):
        result.free = samples[0].quantile(0.5) / sample.quantile(0.5)
    for result, sample in zip(results, samples, strict=False):
        if result.status == "ok":
            result.ms, result.p20, result.p80 = (sample.quantile(q) for q in (0.5, 0.2, 0.8))
            result.n, result.stock_ms = len(sample.times), samples[0].quantile(0.5)
            if result.ideal is not None:
                result.measured = result.stock_ms / result.ms
                result.of_ideal = result.measured / result.ideal
    return results


def row(result: Result) -> tuple[str, ...]:
    """Cells of the table."""
    form = lambda value, text: "" if value is None else text.format(value)  # noqa: E731
    return (
        result.model,
        str(result.batch),
        str(result.r),
        f"{result.tokens_in} > {result.tokens_out}",
        form(result.ms, "{:.2f}"),
        "" if result.p20 is None else f"{result.p20:.2f}..{result.p80:.2f}",
        form(result.stock_ms, "{:.2f}"),
        form(result.ideal, "{:.3f}x"),
        form(result.free, "{:.3f}x"),
        form(result.measured, "{:.3f}x"),
        form(result.of_ideal, "{:.3f}"),
        result.reason or ("stock" if result.r == 0 else ""),
    )


def checks(results: Sequence[Result]) -> list[Check]:
    """At least 0.9 of the ideal, and never slower than stock."""
    found = []
    for r in results:
        if r.r == 0:
            continue
        what = f"{r.model}, batch {r.batch}, r {r.r}"
        wanted = max(WANTED * (r.ideal or 1.0), 1.0)
        got = "" if r.measured is None else f"{r.measured:.3f}x"
        found.append(
            Check(what, got or r.reason, f">= {wanted:.3f}x", None if r.measured is None else r.measured >= wanted)
        )
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = options_of("timm_vit", __doc__, "ViT-B/16 at 224, batch 1, seconds")
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; default all")
    parser.add_argument("--batch", action="append", type=int, help="may be repeated; default 1 and 8")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if any(b < 1 for b in options.batch or ()):
        parser.error("--batch: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done, and thresholds met where asked; 1: one failed, or a result was wrong; 2: bad usage."""
    options = parse(arguments)
    stamp, path, timer = begin("timm_vit", options)
    effort = Effort(options.seconds or (5.0 if options.quick else 40.0), least=3 if options.quick else 7)
    models = options.model or (MODELS[:1] if options.quick else MODELS)
    results: list[Result] = []
    for name in models:
        for batch in options.batch or ((1,) if options.quick else (1, 8)):
            print(f"{name}, batch {batch} ...", file=sys.stderr, flush=True)
            new = measure(name, batch, options.device, effort, timer)
            results += new
            report.print_table(f"{name}, batch {batch}", HEADINGS, [row(r) for r in new])
            save(path, stamp, results, ())
    found = checks(results) if options.check else []
    if found:
        report.print_checks(found)
    save(path, stamp, results, found)
    print(f"wrote {path.relative_to(options.out)}")
    return int(any(r.status != "ok" for r in results) or any(c.ok is not True for c in found))


if __name__ == "__main__":
    sys.exit(main())

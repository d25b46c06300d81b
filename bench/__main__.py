"""`python -m bench`: time every family's cases on this machine and write table, CSV, JSON and picture."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import environment, report, roofline
from bench.cases import Case, Check, Request, families, family
from bench.figure import draw
from bench.rows import Row, append_csv, write_json
from bench.runner import Session, run_case
from bench.timing import CudaTimer, Effort

HERE = Path(__file__).parent


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, checked; a wrong one ends with exit code 2 and one sentence."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--family", action="append", choices=families(), help="may be repeated; default all")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's")
    parser.add_argument("--quick", action="store_true", help="few small cases, under a minute; no thresholds")
    parser.add_argument(
        "--check", action="store_true", help="evaluate the thresholds from this run; exit code 1 where one fails"
    )
    parser.add_argument("--seconds", type=float, help="measuring time per case")
    parser.add_argument(
        "--deadline", type=float, help="start no new case after so many seconds; the rest is listed as not run"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder for results/ and figures/; default bench/ itself"
    )
    options = parser.parse_args(arguments)
    if options.quick and options.check:
        parser.error("--check needs the full sizes: leave out --quick")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: not run, torch finds no CUDA GPU here")
    if options.threads is not None and options.threads < 1:
        parser.error("--threads: expected at least 1")
    return options


def collect(names: Sequence[str], request: Request, only: str | None) -> list[Case]:
    """Cases of all families, the first of each before the second of any: a run cut short has the most important ones."""
    ranked = [(i, case) for name in names for i, case in enumerate(family(name).cases(request))]
    return [case for _, case in sorted(ranked, key=lambda x: x[0]) if only is None or only in case.name]


def save(session: Session, rows: Sequence[Row], checks: Sequence[Check], out: Path, quick: bool) -> list[Path]:
    """JSON and picture per family; rewritten after every case, so that an interrupted run leaves what it has."""
    written = []
    slug = environment.device_slug(session.request.device)
    for name in dict.fromkeys(r.family for r in rows):
        own = [r for r in rows if r.family == name]
        stem = f"{name}-quick" if quick else name
        path = out / "results" / slug / f"{stem}-{session.run}.json"
        write_json(path, session.stamp, session.roofs, own, checks)
        written.append(path)
    return written


def pictures(session: Session, rows: Sequence[Row], out: Path, quick: bool) -> list[Path]:
    """One PNG per family under figures/."""
    written = []
    slug = environment.device_slug(session.request.device)
    git = session.stamp["git"]
    for name in dict.fromkeys(r.family for r in rows):
        path = out / "figures" / f"{slug}-{name}{'-quick' if quick else ''}.png"
        caption = f"{name} on {session.device_name}, {session.request.threads} CPU threads, commit {git['sha']}, {session.stamp['time']}"
        if draw(path, [r for r in rows if r.family == name], session.roofs, caption):
            written.append(path)
    return written


def measure(session: Session, cases: Sequence[Case], options: argparse.Namespace) -> list[Row]:
    """Run the cases, printing and saving each as it is done."""
    start, rows = time.monotonic(), []
    folder = options.out / "results" / environment.device_slug(options.device)
    for number, case in enumerate(cases, 1):
        if options.deadline is not None and time.monotonic() - start > options.deadline:
            new = [session.row(case, status="not run", reason=f"the deadline of {options.deadline:.0f} s had passed")]
        else:
            print(
                f"[{number}/{len(cases)}] {case.family}: {case.name} {case.mode} {case.dtype} ...",
                file=sys.stderr,
                flush=True,
            )
            new = run_case(case, session)
        rows += new
        report.print_case(new)
        append_csv(folder / f"{case.family}{'-quick' if options.quick else ''}.csv", new)
        save(session, rows, (), options.out, options.quick)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done, and thresholds met where asked; 1: a threshold failed or a result was wrong; 2: bad usage."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    timer = CudaTimer() if options.device == "cuda" else None
    nvml = environment.Nvml() if timer else None
    request = Request(options.device, options.quick, timer.l2_bytes if timer else 0)
    cases = collect(options.family or families(), request, options.only)
    if not cases:
        print(f"no case matches --only {options.only}", file=sys.stderr)
        return 2
    stamp = environment.stamp(nvml)
    run = stamp["time"].replace(":", "").replace("-", "").replace("+0000", "Z")
    roofs = roofline.measure(options.device, timer, quick=options.quick)
    effort = Effort(
        options.seconds or (0.8 if options.quick else 2.0 if timer else 4.0),
        least=3 if options.quick else 7 if options.check else 5,
    )
    name = torch.cuda.get_device_name() if timer else environment.cpu_model()
    session = Session(request, roofs, stamp, run, name, effort, timer, nvml)
    report.print_stamp(stamp, roofs)
    rows = measure(session, cases, options)
    checks: list[Check] = []
    if options.check:
        for each in dict.fromkeys(c.family for c in cases):
            module = family(each)
            checks += module.checks(rows, request) if hasattr(module, "checks") else []
        report.print_checks(checks)
    for path in [
        *save(session, rows, checks, options.out, options.quick),
        *pictures(session, rows, options.out, options.quick),
    ]:
        print(f"wrote {path.relative_to(options.out)}")
    wrong = [r for r in rows if r.status in ("wrong", "error")]
    for row in wrong:
        print(f"{row.status}: {row.case} {row.mode} {row.dtype}, {row.provider}: {row.reason}", file=sys.stderr)
    ours_wrong = any(r.role in ("ours", "") for r in wrong)
    return int(ours_wrong or any(c.ok is not True for c in checks))


if __name__ == "__main__":
    sys.exit(main())

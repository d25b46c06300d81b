"""The benchmark harness: what it writes, what it refuses, and that its clocks do what they say. No figure is tested here."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import __main__ as command  # noqa: E402
from bench import environment, figure, gate, memory, report, rows, runner, sanitize, timing  # noqa: E402
from bench.cases import (  # noqa: E402
    Call,
    Case,
    Counts,
    Expected,
    Problem,
    Provider,
    Refused,
    Request,
    buffer_sets,
    families,
    family,
)
from bench.cases import _rope_calls as rope_calls  # noqa: E402
from bench.cases import _rope_checks as rope_checks  # noqa: E402
from bench.cases import _rope_sanitize as rope_sanitize  # noqa: E402
from bench.roofline import Roofs  # noqa: E402
from saccade.rope.positions import grid_positions  # noqa: E402
from saccade.testing import error_budget  # noqa: E402

ROOFS = Roofs(10.0, 1 << 20, {"float32": 0.1}, {"float32": 256})


def session() -> runner.Session:
    return runner.Session(Request(), ROOFS, environment.stamp(), "run", "a cpu", timing.Effort(0.01, least=2, most=3))


def fake_case(**makes) -> Case:
    """x + 1 in float32, by the providers given as role_name=make."""
    x = torch.linspace(0, 1, 1000)
    exact = x.double() + 1
    expected = Expected(("y",), (exact,), {"strict": (1e-7,), "plain": (1e-7,)})
    providers = [Provider(name, name.partition("_")[0], make) for name, make in makes.items()]
    counts = Counts(bytes=8000, flops=1000)
    return Case(
        "fake", "add", "add", "forward", "float32", "1000", counts, lambda: Problem(providers, lambda: expected)
    )


def call(function) -> Call:
    x = torch.linspace(0, 1, 1000)
    return Call([lambda: function(x)], lambda: [function(x)])


def test_gate_refuses_wrong_results_and_they_get_no_time():
    def one_off(x):
        y = x + 1
        y[500] += 1e-5
        return y

    def hole(x):
        y = x + 1
        y[-1] = math.nan
        return y

    def refuse():
        raise Refused("needs a GPU")

    def exhaust():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    found = runner.run_case(
        fake_case(
            eager_right=lambda: call(lambda x: x + 1),
            ours_wrong=lambda: call(one_off),
            ours_hole=lambda: call(hole),
            ours_shape=lambda: call(lambda x: (x + 1)[None]),
            peer_refused=refuse,
            peer_large=exhaust,
            peer_missing=lambda: __import__("no_such_package"),
            copy_x=lambda: Call([lambda: None]),
        ),
        session(),
    )
    by = {r.provider: r for r in found if r.metric == "time"}
    assert by["eager_right"].status == "ok" and by["eager_right"].speedup_eager == 1.0
    for name in ("ours_wrong", "ours_hole", "ours_shape"):
        row = by[name]
        assert row.status == "wrong" and row.value is None and row.speedup_eager is None and row.gbps is None
        assert "x" not in report.line(row, None)[6] and row.reason in report.line(row, None)
    assert "error 9.9" in by["ours_wrong"].reason and "NaN" in by["ours_hole"].reason
    assert (by["peer_refused"].status, by["peer_refused"].reason) == ("refused", "needs a GPU")
    assert by["peer_large"].status == "oom" and by["peer_missing"].status == "refused"
    assert not {r.provider for r in found if r.metric == "peak_extra_memory"} & {"ours_wrong", "peer_large"}


def test_gate_agrees_with_the_rule_of_the_tests():
    torch.manual_seed(0)
    verdicts = set()
    for scale in (0.3, 0.9, 1.1, 3.0):
        exact = torch.randn(3, 700, 5, dtype=torch.float64)
        peer = (exact + 1e-3 * torch.randn_like(exact)).float()
        worst = float((peer.double() - exact).abs().max())
        out = exact.float()
        out[1, 600, 2] += 2 * scale * worst
        ours = gate.judge([out], Expected(("y",), (exact,), {"strict": (gate.largest_error(peer, exact),)}), "strict")
        theirs = error_budget(out, peer, exact)
        assert (ours.ok, ours.max_error, ours.allowed) == (theirs.ok, theirs.error, theirs.allowed)
        verdicts.add(ours.ok)
    assert verdicts == {True, False}


def test_gate_compares_every_piece(monkeypatch):
    monkeypatch.setattr(gate, "_PIECE", 64)
    exact = torch.zeros(4, 100, 3, dtype=torch.float64)
    for place in ((0, 0, 0), (3, 99, 2), (1, 50, 1)):
        out = exact.float()
        out[place] = 7.0
        assert gate.largest_error(out, exact) == 7.0


@pytest.mark.parametrize("which", ["apply_rope", "qk_norm_rope"])
def test_rotary_case_refuses_a_wrong_op(monkeypatch, which):
    """The op turned by a position more is wrong; so is one that forgets its last token."""
    true = getattr(rope_calls, which)

    def shifted(q, k, positions, *rest, **options):
        return true(q, k, positions + 1, *rest, **options)

    def forgetful(q, k, positions, *rest, **options):
        last = [x[:, :, -1].clone() for x in (q, k)]
        q, k = true(q, k, positions, *rest, **options)
        q[:, :, -1], k[:, :, -1] = last
        return q, k

    case = next(c for c in family("rope").cases(Request(quick=True)) if c.op == which and c.dtype == "bfloat16")
    problem = case.build()
    expected = problem.expected()
    provider = next(p for p in problem.providers if p.name == "saccade cpu, in place")
    for op, ok in ((true, True), (shifted, False), (forgetful, False)):
        monkeypatch.setattr(rope_calls, which, op)
        assert gate.judge(provider.make().outputs(), expected, provider.level).ok is ok


def _small(model):
    """A GPU case's model with few tokens, which the CPU can run."""
    if model.grid == (0, 0, 0):
        return dataclasses.replace(model, tokens=48, positions=lambda: model.positions()[:, -48:])
    grid = (2, 4, 6)
    return dataclasses.replace(model, tokens=48, grid=grid, positions=lambda: grid_positions(grid))


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False], ids=["packages", "without packages"])
def test_every_peer_of_the_gpu_cases_passes_the_gate(monkeypatch, installed):
    """Their code paths but the device: the peers' own functions, and the formula that stands in where they are missing."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    if not installed:
        monkeypatch.setattr(rope_calls, "installed", lambda package: "")
    module = family("rope")
    for model, mode, dtypes in module._cuda(False):
        if model.tokens < 48:
            continue
        problem = module._build(_small(model), mode, dtypes[0], Request())
        expected = problem.expected()
        # The copy moves q and k once there and once back, whatever the op beside it needs.
        elements = 48 * (model.q_heads + model.k_heads) * model.spec().head_dim
        assert problem.providers[0].counts == Counts(2 * elements * getattr(torch, dtypes[0]).itemsize)
        names = set()
        for provider in problem.providers:
            names.add(provider.role)
            try:
                made = provider.make()
            except Refused as refusal:
                assert provider.name == "liger-kernel" and "CUDA" in str(refusal)
                continue
            made.runs[-1]()
            if made.outputs is not None:
                verdict = gate.judge(made.outputs(), expected, provider.level)
                assert verdict.ok, (model.name, mode, provider.name, verdict)
        assert names >= {"copy", "ours", "eager", "compile"}


def test_sanitizer_inputs_keep_their_strides_on_the_device():
    wide = torch.full((2, 5, 3, 4, 8), math.nan)
    wide[:, :, 1] = torch.randn(2, 5, 4, 8)
    x = wide[:, :, 1].transpose(1, 2)
    for copy in (rope_sanitize._on(x, "cpu:0"), rope_sanitize._copy(x)):
        assert copy.data_ptr() != x.data_ptr() and copy.stride() == x.stride() and torch.equal(copy, x)
        assert copy.storage_offset() == x.storage_offset()


def test_cpu_timing_interleaves_and_rotates():
    order: list[str] = []
    calls = [Call([lambda n=n, i=i: order.append(f"{n}{i}") for i in range(2)]) for n in "abc"]
    samples = timing.time_cpu(calls, timing.Effort(0.0, least=4))
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1"] * 2
    assert [len(s.times) for s in samples] == [4, 4, 4]
    assert timing.Sample("", "", [4.0, 1.0, 2.0, 3.0]).quantile(0.5) == 2.5


class FakeCuda:
    """torch.cuda that writes down what is asked of it; a graph captures calls without running them again."""

    def __init__(self, milliseconds: float) -> None:
        self.log: list[str] = []
        self.clock, self.milliseconds = 0.0, milliseconds
        fake = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.log.append("event")
                self.time = fake.clock

            def elapsed_time(self, other: Event) -> float:
                return other.time - self.time

        class Graph:
            def replay(self) -> None:
                fake.log.append("replay")
                fake.clock += 20 * fake.milliseconds

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        class Context:
            def __init__(self, *_: object) -> None:
                pass

            def __enter__(self) -> None:
                fake.log.append("(")

            def __exit__(self, *_: object) -> None:
                fake.log.append(")")

        self.Event, self.CUDAGraph, self.Stream, self.graph, self.stream = Event, Graph, Stream, Context, Context
        self.current_stream = Stream
        self.synchronize = lambda: None
        self.current_device = lambda: 0
        self.get_device_properties = lambda index: SimpleNamespace(L2_cache_size=1 << 20)

    def run(self, name: str):
        def launch() -> None:
            if name == "c" and self.log.count("(") > self.log.count(")"):
                raise RuntimeError("operation not permitted when stream is capturing")
            self.log.append(name)
            self.clock += self.milliseconds

        return Call([launch])


@pytest.mark.parametrize("milliseconds", [5.0, 0.01])
def test_cuda_timing_order(monkeypatch, milliseconds):
    fake = FakeCuda(milliseconds)
    buffer = SimpleNamespace(sum=lambda: fake.log.append("flush"))
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=fake, ones=lambda *a, **k: buffer))
    timer = timing.CudaTimer()
    calls = [fake.run(n) for n in "abc"]
    samples = timer.time(calls, timing.Effort(0.0, least=2), sets=1)
    one = [x for n in "abc" for x in ("flush", "event", n, "event")]
    assert fake.log[: 3 * len(one)] == one * 3  # the probe: cold, interleaved, the call alone between its events
    rest = fake.log[3 * len(one) :]
    if milliseconds > timing.GRAPH_BELOW_MS:
        assert rest == one * 2 and {s.timer for s in samples} == {"cuda events"}
    else:
        # a and b are captured, 20 calls each; c must not be, so that it keeps its events and is labelled so.
        assert rest.count("a") == 1 + 20 and [s.timer for s in samples] == ["cuda graph of 20"] * 2 + ["cuda events"]
        assert (
            rest[-2 * 4 - 2 * 2 * 4 :]
            == ["replay", "event", "replay", "event"] * 4 + ["flush", "event", "c", "event"] * 2
        )
        assert [s.cache for s in samples] == ["hot", "hot", "cold (flushed)"]
    for sample in samples:
        assert sample.times == pytest.approx([milliseconds] * 2)


def test_buffers_rotate_only_where_the_cache_could_hold_them():
    cuda = Request(device="cuda", l2_bytes=50)
    assert [buffer_sets(n, cuda) for n in (200, 100, 20, 1)] == [1, 2, 10, 1]
    assert buffer_sets(20, Request()) == 1


def test_stamp_names_the_machine_but_not_its_owner():
    stamp = environment.stamp()
    assert set(stamp) == {"time", "git", "versions", "system", "cpu", "gpu", "binary", "variables"}
    assert stamp["versions"]["torch"] == torch.__version__ and stamp["cpu"]["threads"] == torch.get_num_threads()
    assert (stamp["gpu"] is None) == (not torch.cuda.is_available())
    text = json.dumps(stamp)
    for private in (str(Path.home()), str(ROOT)):
        assert private == "/" or private not in text
    assert platform.node() not in text.replace(environment.cpu_model(), "") or len(platform.node()) < 4


def test_stamp_of_variables(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/somebody/lib/libjemalloc.so")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("SECRET", "x")
    found = environment.variables()
    assert found["LD_PRELOAD"] == "libjemalloc.so" and found["OMP_NUM_THREADS"] == "2" and "SECRET" not in found


def test_throttle_reasons(monkeypatch):
    library = SimpleNamespace(
        NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 0x44,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1000 * kind,
        nvmlDeviceGetPowerUsage=lambda handle: 65000,
    )  # fmt: skip
    nvml = environment.Nvml()
    monkeypatch.setattr(nvml, "_library", library)
    state = nvml.state()
    assert state["throttle"] == ["power cap", "hardware thermal"] and state["power_w"] == 65.0
    assert (state["sm_mhz"], state["memory_mhz"], state["temperature_c"]) == (1000, 2000, None)


def test_files_have_their_schema(tmp_path):
    found = runner.run_case(
        fake_case(eager_x=lambda: call(lambda x: x + 1), copy_x=lambda: Call([lambda: None])), session()
    )
    path = tmp_path / "fake.csv"
    rows.append_csv(path, found)
    rows.append_csv(path, found[:1])
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == rows.COLUMNS and len(read) == len(found) + 1
    assert {r["metric"] for r in read} == {"time", "peak_extra_memory"}
    assert float(read[0]["p20"]) <= float(read[0]["value"]) <= float(read[0]["p80"]) and int(read[0]["n"]) >= 2
    found[0].max_error = math.nan
    rows.write_json(tmp_path / "fake.json", environment.stamp(), ROOFS, found)
    content = json.loads((tmp_path / "fake.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert set(content) == {"stamp", "roofs", "rows", "checks"} and set(content["rows"][0]) == set(rows.COLUMNS)
    assert figure.draw(tmp_path / "fake.png", found, ROOFS, "fake") and (tmp_path / "fake.png").stat().st_size > 5000
    # A file of an older version, with fewer columns, is filled up; one with other columns is left alone.
    path.write_text("run,time\nold,then\n")
    rows.append_csv(path, found[:1])
    with path.open(newline="") as file:
        assert [r["run"] for r in csv.DictReader(file)] == ["old", "run"]
    path.write_text("speed,run\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        rows.append_csv(path, found[:1])
    assert path.read_text() == "speed,run\n1,2\n"


def test_memory_sees_what_is_allocated_outside_torch():
    assert memory.peak_extra(lambda: None, "cpu") in (None, *range(400_000))
    peak = memory.peak_extra(lambda: bytearray(b"x") * 50_000_000, "cpu")
    assert peak is None or 49_000_000 < peak < 60_000_000


def test_counted_bytes_are_those_of_the_physical_limits():
    """Megabytes of q and k, bfloat16, from the shapes of the models."""
    wanted = {
        "Qwen2.5-VL-7B M-RoPE": 536.9,
        "Qwen3-VL-8B norm + M-RoPE": 671.1,
        "Wan2.1-14B RoPE": 3096.6,
        "Wan2.1-1.3B norm + RoPE": 402.6,
        "HunyuanVideo RoPE": 2919.6,
        "CogVideoX-5B RoPE": 431.3,
        "LTX-Video RoPE": 534.8,
    }
    found = {c.name: c for c in family("rope").cases(Request("cuda")) if c.mode == "forward" and c.dtype == "bfloat16"}
    for name, megabytes in wanted.items():
        assert found[name].counts.bytes / 1e6 == pytest.approx(megabytes, rel=0.004), name
    module = family("rope")
    hope = next(m for m, _, _ in module._cuda(False) if "HoPE" in m.name)
    in_place = module.counts(hope, hope.spec(), "forward", 2, inplace=True)
    assert in_place.bytes / 1e6 == pytest.approx(402.7, rel=0.004)


def test_thresholds_fail_without_a_measurement():
    assert all(c.ok is None for c in rope_checks.cpu_checks([], {}, lambda *_: None, Request()))
    assert all(c.ok is None for c in rope_checks.cuda_checks([]) if "liger" not in c.name)
    row = session().row(
        fake_case(), provider=None, value=1.0, copy_fraction=0.79, speedup_eager=20.0, speedup_compile=7.0
    )
    row.case, row.mode, row.dtype, row.provider = rope_checks.PLAIN, "forward", "float32", rope_checks.IN_PLACE
    found = {c.name: c.ok for c in rope_checks.cpu_checks([row], {}, lambda *_: None, Request())}
    assert found["apply_rope in place, float32: bandwidth of copy_"] is False
    assert found["apply_rope in place, float32: against transformers eager"] is True
    row.status = "wrong"
    assert not any(c.ok for c in rope_checks.cpu_checks([row], {}, lambda *_: None, Request()))


def test_every_family_offers_what_the_scripts_call():
    assert "rope" in families() and not any(n.startswith("_") for n in families())
    for name in families():
        assert family(name).cases(Request()) and family(name).cases(Request(quick=True))
        assert callable(family(name).sanitize)


@pytest.mark.slow
def test_sanitizer_calls_reach_every_op():
    count, problems = sanitize.run("cpu", "cpu")
    assert not problems and count > 50


def test_command_line_errors(capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as left:
            command.parse(["--device", "cuda"])
        assert left.value.code == 2 and "finds no CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        command.parse(["--quick", "--check"])
    assert left.value.code == 2
    assert command.main(["--quick", "--only", "no such case"]) == 2


@pytest.mark.slow
def test_quick_run_writes_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # Inductor alone takes longer than all else
    assert command.main(["--quick", "--only", "Wan", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    kinds = sorted(p.suffix for p in tmp_path.rglob("*") if p.is_file())
    assert kinds == [".csv", ".json", ".png"]
    content = json.loads(next(tmp_path.rglob("*.json")).read_text())
    ok = {r["provider"] for r in content["rows"] if r["status"] == "ok"}
    assert {"torch copy_", "saccade cpu", "saccade cpu, in place"} <= ok
    out = capsys.readouterr().out
    assert "saccade cpu, in place" in out and "roofs measured now" in out


def test_gpu_script_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("not run: there is a GPU")
    done = subprocess.run(["bash", ROOT / "bench/gpu.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3 and done.stdout.startswith("not run: no NVIDIA GPU") and done.stdout.count("\n") == 1

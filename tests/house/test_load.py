"""Loading: one schema table for both languages, and clear words where the binary is absent or does not fit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saccade
from saccade._load import BINARY, schemas

PACKAGE = Path(saccade.__file__).parent


def in_process(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    # The copy must win over an editable install of the original.
    path = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
    )
    return subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, timeout=120)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package without its binary."""
    shutil.copytree(
        PACKAGE, tmp_path / "saccade", ignore=shutil.ignore_patterns("*.so", "__pycache__", "_no_binary.txt")
    )
    shutil.copytree(PACKAGE.parents[1] / "kernels/triton", tmp_path / "saccade/_triton", dirs_exist_ok=True)
    return tmp_path


def test_the_binary_is_loaded_and_registered_what_the_table_says():
    assert BINARY.problem is None
    for name, text in schemas().items():
        registered = str(getattr(torch.ops.saccade, name).default._schema)
        assert registered.replace("saccade::", "").replace(" ", "") == text.replace(" ", "")


REFERENCE_WORKS = """
import torch, saccade
from saccade.rope import RopeSpec, apply_rope
s = RopeSpec(4, (1.0, 0.5), (0, 0))
q = torch.ones(1, 1, 3, 4)
print(saccade.explain("apply_rope", q, None, torch.arange(3), s))
apply_rope(q, None, torch.arange(3), s)
try:
    apply_rope(q, None, torch.arange(3), s, impl="cpu")
except ValueError as error:
    print("ERROR", error)
print(torch.ops.saccade.apply_rope.default._schema)
"""


def test_without_a_binary_the_reference_runs_and_says_why(copy):
    (copy / "saccade/_no_binary.txt").write_text("no C++ compiler was found when saccade was installed\n")
    done = in_process(copy, REFERENCE_WORKS)
    assert done.returncode == 0, done.stderr
    assert "reference runs" in done.stdout
    assert "ERROR impl: 'cpu' cannot run apply_rope here: no compiled library: no C++ compiler was found" in done.stdout
    assert "saccade::apply_rope(Tensor q" in done.stdout


def test_a_broken_binary_gives_one_sentence_with_the_remedy(copy):
    (copy / "saccade/_C.so").write_bytes(b"not a library")
    done = in_process(copy, REFERENCE_WORKS)
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("ERROR"))
    assert "_C.so could not be loaded into torch" in line and "rebuild it with `pip install" in line


def test_a_binary_of_another_version_is_refused(copy):
    shutil.copy(PACKAGE / "_C.so", copy / "saccade/_C.so")
    table = copy / "saccade/_schemas.inc"
    table.write_text(table.read_text() + 'OP("new_op(Tensor x) -> Tensor")\n')
    done = in_process(copy, REFERENCE_WORKS)
    assert done.returncode == 0, done.stderr
    assert "was built from another version of Saccade (ops missing or changed: new_op)" in done.stdout


def test_a_changed_schema_is_refused(copy):
    shutil.copy(PACKAGE / "_C.so", copy / "saccade/_C.so")
    table = copy / "saccade/_schemas.inc"
    table.write_text(
        table.read_text().replace("bool inverse) -> (Tensor, Tensor)", "bool backward) -> (Tensor, Tensor)")
    )
    done = in_process(copy, REFERENCE_WORKS)
    assert done.returncode == 0, done.stderr
    assert "was built from another version of Saccade (ops missing or changed: apply_rope)" in done.stdout


def test_doctor_prints_every_op(capsys):
    from rich.console import Console

    from saccade import doctor

    assert doctor.run(Console(width=200)) == 0
    text = capsys.readouterr().out
    assert "apply_rope" in text and "qk_norm_rope" in text and "CPU features" in text and "driver" in text
    assert "needs tensors on a CUDA device" in text


def test_every_op_of_the_table_belongs_to_one_family():
    """Each family checks that all of its ops pass opcheck; none may stand outside."""
    families = [set(module.FAKES) for module in (saccade.attention._fakes, saccade.merge._fakes, saccade.rope._fakes)]
    assert set.union(*families) == set(schemas()) and sum(map(len, families)) == len(schemas())

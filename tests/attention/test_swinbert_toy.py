"""The toy captioner end to end: the mask becomes sparse, hardening changes little, and the layout is what the hard bias is."""

from __future__ import annotations

import pytest
import torch

from bench.swinbert_toy import Settings, Trial, main, run, table

SMALL = Settings(grid=(4, 4, 4), batch=8, steps=150)


@pytest.fixture(scope="module")
def outcome():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast at this size, and alone where others compute too
    yield run(SMALL)
    torch.set_num_threads(threads)


def test_the_mask_becomes_sparse_and_the_task_is_learned(outcome):
    assert outcome.before.kept == 1.0
    assert outcome.after.kept < 0.3
    assert outcome.after.between < 0.1
    assert outcome.soft.loss < 0.3 * outcome.start.loss


def test_hardening_changes_little_and_the_layout_nothing(outcome):
    assert outcome.layout_error < 1e-5
    assert outcome.change < 0.2
    assert abs(outcome.hard.loss - outcome.soft.loss) < 0.2


def test_the_table_names_what_was_measured(outcome):
    labels = list(table(outcome).columns[0].cells)
    assert "pairs of video tokens kept" in labels and "blocks of 64 computed" in labels


def test_the_task_does_not_reach_a_mask_that_starts_as_published():
    trial = Trial(Settings(grid=(4, 4, 4), batch=2, init=None))
    trial.logits(*(x[:2] for x in trial.held_out), trial.soft()).square().sum().backward()
    assert float(trial.mask.weight.grad.abs().max()) == 0.0
    reached = Trial(Settings(grid=(4, 4, 4), batch=2))
    reached.logits(*(x[:2] for x in reached.held_out), reached.soft()).square().sum().backward()
    assert float(reached.mask.weight.grad.abs().max()) > 0.0


def test_options(tmp_path, capsys):
    out = main(
        ["--steps", "3", "--layers", "1", "--batch", "2", "--published", "--picture", str(tmp_path / "mask.png")]
    )
    assert out.settings.init is None and out.settings.sparsity == 0.5 and out.settings.layers == 1
    assert (tmp_path / "mask.png").exists() and "SwinBERT's mask on a toy" in capsys.readouterr().out

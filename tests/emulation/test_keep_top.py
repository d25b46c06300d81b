"""keep_top on the emulated GPU: the same indices as the reference."""

from __future__ import annotations

import pytest
import torch
from emulation.cuda_emulator import call
from emulation.merge_structs import KeepTopArgs

from saccade.reference.keep_top import keep_top

INF, NAN = float("inf"), float("nan")


def run(scores: torch.Tensor, k: int) -> torch.Tensor:
    assert scores.shape[1] == 0 or scores.stride(1) == 1
    out = torch.full((scores.shape[0], k), -99, dtype=torch.int64)
    call(
        "keep_top",
        "keep_top",
        KeepTopArgs(scores.data_ptr(), scores.stride(0), *scores.shape, k, out.data_ptr()),
    )
    return out


def scores_of(kind: str, batch: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.randn(batch, tokens, generator=generator)
    if kind == "ties":
        return (scores * 2).round()
    if kind == "special":
        special = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 1e-42, -1e-42, 1.0])
        return special[torch.randint(len(special), (batch, tokens), generator=generator)]
    return torch.full_like(scores, 3.0) if kind == "all_equal" else scores


@pytest.mark.parametrize("kind", ["random", "ties", "special", "all_equal"])
@pytest.mark.parametrize("tokens", [1, 31, 97, 400])
def test_same_indices(kind: str, tokens: int) -> None:
    scores = scores_of(kind, 2, tokens)
    for k in sorted({1, tokens // 3, tokens - 1, tokens}):
        assert torch.equal(run(scores, k), keep_top(scores, k)), f"k = {k}"


def test_rows_may_lie_apart_or_be_one() -> None:
    wide = scores_of("ties", 3, 120)
    assert torch.equal(run(wide[:, :50], 7), keep_top(wide[:, :50], 7))
    one = wide[:1].expand(3, -1)
    assert torch.equal(run(one, 7), keep_top(one, 7))


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(RuntimeError, match="keep_top: k"):
        run(torch.zeros(1, 3), 4)

"""knn_density on the emulated GPU, inside the error budget of the reference."""

from __future__ import annotations

from ctypes import c_int64

import pytest
import torch
from emulation.cuda_emulator import DTYPES, call, workspace
from emulation.merge_structs import KnnDensityArgs

from saccade.reference.knn_density import knn_density
from saccade.testing.budget import check_budget

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INF, NAN = float("inf"), float("nan")


def run(x: torch.Tensor, k: int) -> torch.Tensor:
    assert x.stride(2) == 1 or x.shape[2] < 2
    out = torch.full(x.shape[:2], NAN)
    args = KnnDensityArgs(x.data_ptr(), (c_int64 * 2)(*x.stride()[:2]), *x.shape, k, DTYPES[x.dtype], out.data_ptr())
    space = workspace("knn_density", "knn_density", args)
    args.workspace = space.data_ptr()
    call("knn_density", "knn_density", args)
    return out


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x: torch.Tensor, k: int) -> None:
    check_budget("knn_density", run(x, k), knn_density(x.float(), k), knn_density(x.double(), k))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("batch", "tokens", "channels", "k"), [(2, 40, 24, 5), (1, 70, 100, 32), (1, 9, 7, 9)])
def test_inside_the_budget(dtype: torch.dtype, batch: int, tokens: int, channels: int, k: int) -> None:
    check(rows(batch, tokens, channels, dtype=dtype), k)


def test_three_tiles_and_several_chunks() -> None:
    check(rows(1, 150, 144, dtype=F32), 4)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_integers_are_exact(dtype: torch.dtype) -> None:
    x = torch.randint(-2, 3, (1, 80, 16), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(run(x, 4), knn_density(x.float(), 4))


def test_equal_rows_are_at_distance_zero() -> None:
    assert torch.equal(run(torch.full((1, 66, 32), 0.5, dtype=F16), 7), torch.zeros(1, 66))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_that_are_not_finite_have_no_neighbours(dtype: torch.dtype) -> None:
    x = rows(1, 67, 20, dtype=dtype, seed=2)
    x[0, 3, 4], x[0, 65, 0], x[0, 10, 19], x[0, 20] = NAN, INF, -INF, 1e38
    out, clean = run(x, 5), [n for n in range(67) if n not in (3, 65, 10, 20)]
    assert out[0, [3, 65, 10, 20]].isposinf().all()
    assert torch.equal(out[:, clean], run(x[:, clean].contiguous(), 5))
    few = x[:, [3, 0, 65, 1]].contiguous()
    check_budget(
        "two finite rows",
        run(few, 4)[:, 1::2],
        knn_density(few.float(), 4)[:, 1::2],
        knn_density(few.double(), 4)[:, 1::2],
    )


@pytest.mark.parametrize("dtype", [F32, F16])
def test_memory_layouts(dtype: torch.dtype) -> None:
    wide = rows(2, 30, 40, dtype=dtype, seed=3)
    for x in (wide[..., :21], wide[..., 1:22], wide[:, ::2, 8:24], wide[:1].expand(2, -1, -1)):
        assert torch.equal(run(x, 3), run(x.contiguous(), 3))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty(shape: tuple[int, int, int]) -> None:
    assert run(torch.zeros(shape), 1).shape == shape[:2]


def test_too_many_neighbours_are_refused() -> None:
    with pytest.raises(RuntimeError, match="k from 1 to 32"):
        run(torch.zeros(1, 40, 8), 33)

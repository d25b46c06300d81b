"""row_similarity on the emulated GPU, inside the error budget of the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulation.cuda_emulator import DTYPES as DTYPE_NUMBERS
from emulation.cuda_emulator import call
from emulation.merge_structs import RowSimilarityArgs
from emulation.plan_cases import NAN, Output, bits, tensor

from saccade.reference.row_similarity import row_similarity
from saccade.testing.budget import check_budget

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INF = float("inf")


def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    batch, tokens, channels = x.shape
    out = Output((batch, tokens), F32)
    strides = ((ctypes.c_int64 * 2)(*t.stride()[:2]) for t in (x, y))
    where = out.tensor.data_ptr()
    numbers = batch, tokens, channels, DTYPE_NUMBERS[x.dtype]
    call("row_similarity", "row_similarity", RowSimilarityArgs(x.data_ptr(), y.data_ptr(), *strides, *numbers, where))
    return out.checked()


def check(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = run(x, y)
    check_budget(name, out, row_similarity(x, y), row_similarity(x.double(), y.double()))
    return out


@pytest.mark.parametrize("layout", ["dense", "packed", "odd"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("channels", [1, 7, 36, 64, 264, 1048])
def test_inside_the_budget(channels: int, dtype: torch.dtype, layout: str) -> None:
    tokens = 16 if channels > 100 else 40
    x, y = (tensor((2, tokens, channels), dtype, layout, seed=seed) for seed in (1, 2))
    check("apart", x, y)


def test_one_row_for_many() -> None:
    x = tensor((3, 20, 48), BF16, seed=1)
    for y in (tensor((1, 1, 48), BF16, seed=2), tensor((3, 1, 48), BF16, seed=2), tensor((1, 20, 48), BF16, seed=2)):
        check("expanded", x, y.expand(3, 20, -1))


def test_frames_against_the_next_frame() -> None:
    video = tensor((2, 30, 72), F16, seed=1)
    check("next", video[:, :-6], video[:, 6:])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_zero_rows_are_0_and_rows_that_are_not_finite_nan(dtype: torch.dtype) -> None:
    x, y = tensor((1, 8, 40), dtype, seed=1), tensor((1, 8, 40), dtype, seed=2)
    x[0, 0], y[0, 1] = 0.0, 0.0
    x[0, 2, 3], y[0, 3, 39], x[0, 4, 0] = NAN, INF, -INF
    x[0, 5] = 3e38  # the square overflows float32
    x[0, 6], y[0, 6] = 0.0, NAN
    out = run(x, y)[0]
    assert (out[:2] == 0.0).all() and out[2:7].isnan().all() and out[7].isfinite()
    check_budget(
        "the others", out[[0, 1, 7]], *(row_similarity(*t)[0, [0, 1, 7]] for t in ((x, y), (x.double(), y.double())))
    )


@pytest.mark.parametrize("dtype", [F32, F16])
def test_equal_rows_have_equal_bits(dtype: torch.dtype) -> None:
    """Wherever they stand, whatever else is in the batch, and however the memory is aligned."""
    for channels in (24, 300):
        x, y = (tensor((1, 1, channels), dtype, seed=seed) for seed in (1, 2))
        many = run(x.expand(2, 37, -1).contiguous(), y.expand(2, 37, -1))
        odd = run(tensor((1, 3, channels), dtype, "odd").copy_(x), tensor((1, 3, channels), dtype, "odd").copy_(y))
        assert (bits(many) == bits(many)[0, 0]).all() and (bits(odd) == bits(many)[0, 0]).all()


@pytest.mark.parametrize(("batch", "tokens", "channels"), [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty_extents(batch: int, tokens: int, channels: int) -> None:
    x = torch.ones(batch, tokens, channels)
    assert torch.equal(run(x, x), torch.zeros(batch, tokens))


def test_other_dtypes_are_refused() -> None:
    x = torch.zeros(1, 2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="row_similarity: the GPU kernels take float32"):
        run(x, x)

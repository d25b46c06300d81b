"""Small models of every family, with random weights, and what is asked of each swap."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import saccade
from saccade.testing import same_state, state_of

Tensor = torch.Tensor


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode whose parameters are random, also those that start at zero or one."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "scale_shift_table" in name:
                parameter.normal_(0, 0.1)
    return model


def output(value: Any) -> Tensor:
    """The tensor that a model is for."""
    if isinstance(value, Tensor):
        return value
    for name in ("logits", "sample", "last_hidden_state"):
        found = getattr(value, name, None)
        if found is not None:
            return found
    return output(value[0])


def run(
    model: nn.Module, given: dict[str, Any], *, backward: bool = False, seed: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and gradients of all parameters where asked."""
    if not backward:
        with torch.no_grad():
            return output(model(**given)), {}
    model.zero_grad(set_to_none=True)
    out = output(model(**given))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    (out * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out.detach(), grads


def in_double(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def check_lossless(
    model: nn.Module, given: dict[str, Any], recipe: Any = "lossless", *, double: Any = None, expect: int = 1
) -> Any:
    """Outputs within twice, gradients within three times stock's own error against float64; and `expect` sites were swapped.

    Errors of gradients are the largest of two random losses (of six, where those of two do not settle it), over all parameters of one
    kind (the same name in every block): that of one small tensor is rounding of a few sums, and the luck of one draw. `double` is the
    float64 twin (a deep copy where None).
    """
    exact = copy.deepcopy(model).double() if double is None else double
    budgets: dict[str, float] = {}
    errors: dict[str, float] = {}
    for seed in range(1, 7):
        want, want_grads = run(exact, in_double(given), backward=True, seed=seed)
        stock, stock_grads = run(model, given, backward=True, seed=seed)
        with saccade.accelerated(model, recipe) as report:
            assert len(report.swapped) >= expect, str(report)
            ours, our_grads = run(model, given, backward=True, seed=seed)
        assert not report.notes, report.notes
        assert ours.shape == stock.shape and ours.dtype == stock.dtype
        within(ours, stock, want, 2, "output")
        assert our_grads.keys() == stock_grads.keys() == want_grads.keys()
        for found, grads in ((budgets, stock_grads), (errors, our_grads)):
            for name, grad in grads.items():
                kind = re.split(r"\d+\.", name)[-1]
                found[kind] = max(found.get(kind, 0.0), float((grad.double() - want_grads[name]).abs().max()))
        if seed > 1 and all(error <= 3 * budgets[kind] for kind, error in errors.items()):
            break
    for kind, error in errors.items():
        assert error <= 3 * budgets[kind], f"gradient of {kind}: error {error:.3e}, stock {budgets[kind]:.3e}"
    return report


def within(ours: Tensor, stock: Tensor, want: Tensor, factor: float, what: str) -> None:
    error, own = (float((x.double() - want).abs().max()) for x in (ours, stock))
    assert error <= factor * own, f"{what}: error {error:.3e}, stock {own:.3e}"


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside anything may happen; afterwards the model holds the same objects under the same names."""
    before, keys = state_of(model), list(model.state_dict())
    yield
    after = state_of(model)
    differ = {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}
    assert same_state(before, after), differ
    assert list(model.state_dict()) == keys


def check_restore(model: nn.Module, given: dict[str, Any], recipe: Any) -> None:
    """Bit-equal outputs and the same object graph after restore, also twice and after an exception."""
    stock, _ = run(model, given)
    keys = list(model.state_dict())
    with unchanged(model):
        report = saccade.accelerate(model, recipe)
        assert report.swapped and report.applied
        assert list(model.state_dict()) == keys
        run(model, given)
        saccade.accelerate(model, recipe)  # twice: the second takes the place of the first
        saccade.restore(model)
        saccade.restore(model)
    assert torch.equal(run(model, given)[0], stock)
    with unchanged(model), contextlib.suppress(ZeroDivisionError), saccade.accelerated(model, recipe):
        raise ZeroDivisionError
    with unchanged(model):
        saccade.plan(model, recipe)


def check_copies(model: nn.Module, given: dict[str, Any], recipe: Any) -> None:
    """A copy of a swapped model has its own swap: restoring one leaves the other. The recipe changes the output."""
    original = copy.deepcopy(model)
    stock, _ = run(original, given)
    saccade.accelerate(original, recipe)
    swapped, _ = run(original, given)
    other = copy.deepcopy(original)
    saccade.restore(original)
    assert torch.equal(run(original, given)[0], stock)
    assert torch.equal(run(other, given)[0], swapped) and not torch.equal(swapped, stock)
    saccade.restore(other)
    assert torch.equal(run(other, given)[0], stock)


# ---- diffusers ----------------------------------------------------------------------------------------------------------
def wan(**changes: Any) -> nn.Module:
    from diffusers import WanTransformer3DModel

    config: dict[str, Any] = dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=48, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=128, num_layers=3, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip
    return seeded(lambda: WanTransformer3DModel(**{**config, **changes}))


def wan_inputs(model: Any, frames: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    return dict(
        hidden_states=torch.randn(2, model.config.in_channels, frames, 16, 20, generator=g).to(dtype),
        timestep=torch.tensor([500, 500]),
        encoder_hidden_states=torch.randn(2, 12, model.config.text_dim, generator=g).to(dtype),
    )

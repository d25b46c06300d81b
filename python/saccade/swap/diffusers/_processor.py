"""What all swapped attention processors of diffusers share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from saccade.rope import RopeSpec, apply_rope, qk_norm_rope
from saccade.swap.attend import Attend, Context, sdpa
from saccade.swap.source import is_bare, untested
from saccade.swap.tokens import Tokens

__all__ = ["Processor", "Watch", "indices", "plain_rms_norm", "processor_reason", "project", "rotary_reason"]

Tensor = torch.Tensor


class Processor:
    """Takes the place of a stock processor. Settings that diffusers keeps on processors stay on the stock one.

    Args:
        stock: the processor that was there.
        attend: what attention does.
        spec: of the rotation, where positions come in place of tables; None: tables come, as in stock.
    """

    def __init__(self, stock: Any, attend: Attend, spec: RopeSpec | None = None) -> None:
        self.stock, self.attend, self.spec = stock, attend, spec
        # None: the stock processor calls torch itself (CogVideoX, Mochi)
        self._dispatch = self.of_stock("dispatch_attention_fn")

    def of_stock(self, name: str) -> Any:
        """What a global name means to the stock processor, or None."""
        return getattr(type(self.stock).__call__, "__globals__", {}).get(name)

    @property
    def _attention_backend(self) -> Any:
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.stock._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.stock._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.stock._parallel_config = value

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, stock_mask: Tensor | None = None
    ) -> Tensor:
        """Attention in diffusers' order of axes: [B, S, H, D] in and out.

        Args:
            q, k, v: [B, S, H, D].
            key_mask: bool [B, S], True where a key may be seen.
            stock_mask: the same as stock gives it to its backend.
        """
        parallel = getattr(self, "_parallel_config", None)
        slot = self.attend.rule_now()
        if slot is None or slot.rule.kernel == "stock":
            return self._stock(q, k, v, stock_mask, parallel)
        config = None if parallel is None else parallel.context_parallel_config
        if config is None:
            return self._attend(q, k, v, key_mask, lambda: self._stock(q, k, v, stock_mask, None))
        reason = _unshared(config, q.shape[2])
        if reason is not None:
            self.attend.decline(reason)
            return self._stock(q, k, v, stock_mask, parallel)
        group = config._ulysses_mesh.get_group()
        q, k, v = (_to_heads(x, group, config.ulysses_degree) for x in (q, k, v))
        return _to_tokens(self._attend(q, k, v, key_mask, None), group, config.ulysses_degree)

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Stock attention [B, S, H, D] under a mask that differs from query to query: no kernel of ours takes one."""
        self.attend.decline("the model gave a mask of queries and keys")
        return self._stock(q, k, v, mask, getattr(self, "_parallel_config", None))

    def norms(self, attn: Any, q: Tensor) -> tuple[nn.Module, nn.Module] | None:
        """norm_q and norm_k where they can be fused with the rotation of `q`, or None."""
        norms = (attn.norm_q, attn.norm_k)
        if self.spec is None or not all(plain_rms_norm(norm) for norm in norms):
            return None
        dtypes = {norm.weight.dtype for norm in norms}
        alike = len(dtypes) == 1 and norms[0].eps == norms[1].eps
        return norms if alike and dtypes <= {q.dtype, torch.float32} else None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, stock: Callable[[], Tensor] | None
    ) -> Tensor:
        back = None if stock is None else lambda: stock().transpose(1, 2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self.attend(q, k, v, key_mask=key_mask, stock=back).transpose(1, 2)

    def _stock(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, parallel: Any) -> Tensor:
        if self._dispatch is None:
            return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask).transpose(1, 2)
        options = {"backend": self._attention_backend, "parallel_config": parallel}
        out: Tensor = self._dispatch(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, **options)
        return out

    def rotate(
        self, q: Tensor, k: Tensor, positions: Tensor, norms: tuple[nn.Module, nn.Module] | None, norm: Any = "head"
    ) -> tuple[Tensor, Tensor]:
        """q and k [B, S, H, D], normalised by `norms` (None: they are), then turned by `positions` [axes, S]."""
        assert self.spec is not None
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if norms is None:
            q, k = _pair(apply_rope(q, k, positions, self.spec))
        else:
            weights, eps = (norms[0].weight, norms[1].weight), norms[0].eps
            q, k = _pair(qk_norm_rope(q, k, positions, self.spec, *weights, norm=norm, eps=eps))
        return q.transpose(1, 2), k.transpose(1, 2)


def _pair(values: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    assert values[1] is not None
    return values[0], values[1]


def _unshared(config: Any, heads: int) -> str | None:
    """Why ranks cannot share attention by heads, as Ulysses has it, or None."""
    if config.ring_degree > 1:
        return "a ring shows each rank a part of the keys; use Ulysses"
    if getattr(config, "ulysses_anything", False):
        return "ulysses_anything gives ranks unequal shares of the tokens"
    if heads % config.ulysses_degree:
        return f"{heads} heads cannot be shared by {config.ulysses_degree} ranks"
    return None


def _exchange(x: Tensor, group: Any) -> Tensor:
    from torch.distributed import _functional_collectives as collectives

    out: Tensor = collectives.all_to_all_single_autograd(x.contiguous(), None, None, group)
    return collectives.wait_tensor(out) if not out.requires_grad else out


def _to_heads(x: Tensor, group: Any, ranks: int) -> Tensor:
    """[B, S / P, H, D] of every rank -> [B, S, H / P, D]."""
    batch, local, heads, width = x.shape
    x = x.reshape(batch, local, ranks, heads // ranks, width).permute(2, 0, 1, 3, 4)  # [P, B, S / P, H / P, D]
    return _exchange(x, group).permute(1, 0, 2, 3, 4).reshape(batch, ranks * local, heads // ranks, width)


def _to_tokens(x: Tensor, group: Any, ranks: int) -> Tensor:
    """[B, S, H / P, D] -> [B, S / P, H, D]."""
    batch, tokens, heads, width = x.shape
    x = x.reshape(batch, ranks, tokens // ranks, heads, width).permute(1, 0, 2, 3, 4)  # [P, B, S / P, H / P, D]
    return _exchange(x, group).permute(1, 2, 0, 3, 4).reshape(batch, tokens // ranks, ranks * heads, width)


def indices(grid: Sequence[int], device: torch.device) -> Tensor:
    """Indices [3, T*H*W] of a grid's tokens, made where they are used: nothing waits, and torch.compile sees all of it."""
    axes = (torch.arange(size, device=device) for size in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


def project(attn: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v by the module's own linear layers, fused ones where `fuse_projections` was called."""
    if getattr(attn, "fused_projections", False):
        q, k, v = attn.to_qkv(hidden).chunk(3, dim=-1)
        return q, k, v
    return attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)


def plain_rms_norm(norm: Any) -> bool:
    """Whether a norm is torch's RMSNorm with a weight that may be read: nobody hooks it (offloading, casting, LoRA)."""
    if type(norm) is not nn.RMSNorm or type(norm.weight) is not nn.Parameter or norm.eps is None:
        return False
    return not (norm._forward_hooks or norm._forward_pre_hooks) and is_bare(norm)


def _is_wrapped(module: nn.Module) -> bool:
    """Whether hooks of diffusers or accelerate lie around the class's forward, and nothing else."""
    references = getattr(vars(module).get("_diffusers_hook"), "_fn_refs", None)
    inner = vars(module).get("_old_forward") if "_hf_hook" in vars(module) else None
    if references:
        inner = references[0].original_forward or references[0].forward
    return getattr(inner, "__func__", None) is type(module).forward


def processor_reason(attn: Any, tested: dict[str, set[str]], versions: str) -> str | None:
    """Why an attention module cannot be swapped: its forward or its processor is not one that was tested; or None."""
    stock = getattr(attn, "processor", None)
    for name, function in (
        (f"{type(attn).__name__}.forward", type(attn).forward),
        (f"{type(stock).__name__}.__call__", vars(type(stock)).get("__call__")),
    ):
        reason = untested(name, function, tested, versions)
        if reason is not None:
            return reason
    return None if is_bare(attn) or _is_wrapped(attn) else "its forward was replaced by someone else"


def rotary_reason(rope: nn.Module, tested: dict[str, set[str]], versions: str, *functions: Any) -> str | None:
    """Why the module that makes the tables cannot be swapped, or None; `functions` are others that are relied on."""
    for function in (type(rope).forward, *functions):
        name = getattr(function, "__qualname__", "the function that rotates")
        reason = untested(name, function, tested, versions)
        if reason is not None:
            return reason
    if is_bare(rope):
        return None
    if _is_wrapped(rope):
        return "hooks lie around its forward; accelerate first, then set them"
    return "its forward was replaced by someone else"


class Watch:
    """A pre-hook of the root: writes the tokens and the step of each call into the context.

    Args:
        context: of the model.
        tokens_of: (root, arguments by name) -> Tokens, or None where it cannot tell.
        names: of the positional arguments of the root's forward.
        pipeline: whose scheduler knows the step, or None.
    """

    def __init__(
        self, context: Context, tokens_of: Callable[..., Tokens | None], names: tuple[str, ...], pipeline: Any
    ) -> None:
        self.context, self.tokens_of, self.names = context, tokens_of, names
        self.pipeline = None if pipeline is None else weakref.ref(pipeline)  # the transformer may outlive it
        self._schedule: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model is in no pipeline: it counts timesteps."""
        return {**vars(self), "pipeline": None, "_schedule": None}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See the class."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        device = given["hidden_states"].device
        self.context.begin(self.tokens_of(root, given), device, given.get("timestep"), self._index())

    def _index(self) -> int | None:
        """The step by the pipeline's scheduler. One that counts none (CogVideoX) makes new timesteps for each video."""
        scheduler = getattr(None if self.pipeline is None else self.pipeline(), "scheduler", None)
        if scheduler is not None and hasattr(scheduler, "step_index"):
            return scheduler.step_index or 0
        schedule = getattr(scheduler, "timesteps", None)
        if self._schedule is not None and schedule is not self._schedule:
            self.context.reset()
        self._schedule = schedule
        return None

"""What models share whose attention sees the video and the text in one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from saccade.rope import RopeSpec, apply_rope, qk_norm_rope
from saccade.swap.attend import Attend, Context
from saccade.swap.diffusers._place import FUSED, place
from saccade.swap.diffusers._processor import Processor, Watch, processor_reason, rotary_reason
from saccade.swap.diffusers._tables import turned_pairs
from saccade.swap.edit import Edit
from saccade.swap.recipe import ATTENTION
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.source import fingerprint, is_bare
from saccade.swap.tokens import Tokens

__all__ = ["JointAdapter", "JointProcessor", "key_mask_of", "table_reason", "zero_rows"]

Tensor = torch.Tensor
Rotary = tuple[Any, Any]
# diffusers' own RMS norms: class -> (sources of forward, whether the output has the dtype of the input whatever the weight's)
_NORMS = {"RMSNorm": ({"ee403ba66f30b653", "2f239401b869fa64"}, False), "MochiRMSNorm": ({"8a1700c49859ab5e"}, True)}


class JointProcessor(Processor):
    """A processor of joint attention. A rotation comes as tables, as in stock, or as (positions [S, 3], anything).

    Attributes:
        known: classes of norms whose source is known -> whether the output has the dtype of the input whatever the weight's. Looked up
            when the processor is put in place: compiled code reads no source.
    """

    known: Mapping[type, bool] = MappingProxyType({})

    def turn(
        self,
        norms: tuple[Any, Any],
        q: Tensor,
        k: Tensor,
        rotary: Rotary | None,
        spec: RopeSpec | None,
        *,
        before: int = 0,
        after: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Norm of q and k, then rotation of the video's part: one pass where positions come and the norms may be read.

        Args:
            norms: of q and of k; None: none.
            q, k: [B, before + S + after, H, D].
            rotary: (positions [S, 3], anything) or tables (cos, sin); None: no rotation.
            spec: of the positions; None: rotary is tables.
            before, after: text tokens, which do not turn.
        """
        if rotary is None or spec is None:
            q, k = (x if norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True))
            if rotary is not None:
                q, k = (self.turned(x, *rotary, before, after) for x in (q, k))
            return q, k
        positions = F.pad(rotary[0].t(), (before, after)).to(q.device)  # nothing turns at position 0
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        readable = all(_readable(norm, x, self.known) for norm, x in zip(norms, (q, k), strict=True))
        if not spec.learned and readable and norms[0].eps == norms[1].eps:
            weights = (norms[0].weight, norms[1].weight)
            q, turned = qk_norm_rope(q, k, positions, spec, *weights, eps=norms[0].eps)
        else:
            q, k = (x if norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True))
            q, turned = apply_rope(q, k, positions, spec)
        assert turned is not None
        return q.transpose(1, 2), turned.transpose(1, 2)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor, before: int, after: int) -> Tensor:
        """Interleaved pairs of x [B, before + S + after, H, D] turned by tables [S, D] in which each angle stands twice."""
        middle = x[:, before : x.shape[1] - after]
        cos, sin = (t.to(x.device)[None, :, None, 0::2] for t in (cos, sin))
        out = turned_pairs(middle.float(), cos, sin).type_as(x)
        return torch.cat((x[:, :before], out, x[:, x.shape[1] - after :]), 1) if before or after else out

    def joint(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, stock_mask: Tensor | None) -> Tensor:
        """Attention [B, S, H, D] of all tokens; a mask that no key mask stands for, and ranks that share a sequence, get stock's."""
        dtype, parallel = q.dtype, getattr(self, "_parallel_config", None)
        q, k = q.type_as(v), k.type_as(v)  # as autocast does with norms in fp32
        if parallel is None and (stock_mask is None) == (key_mask is None):
            return self.attention(q, k, v, key_mask=key_mask, stock_mask=stock_mask).to(dtype)
        if parallel is None:
            assert stock_mask is not None
            return self.masked(q, k, v, stock_mask).to(dtype)
        self.attend.decline("the ranks that share a sequence mix video and text")
        return self._stock(q, k, v, stock_mask, parallel).to(dtype)


def key_mask_of(mask: Tensor | None, batch: int) -> Tensor | None:
    """[batch, S] of a bool mask [B, 1, 1, S]; None where it is another."""
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return None
    return mask[:, 0, 0].expand(batch, -1)


def zero_rows(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, S, C] with zeros where mask [B, S] is False."""
    return x.masked_fill(~mask[..., None], 0)


def known_norms(modules: Iterable[nn.Module]) -> dict[type, bool]:
    """Of the norms right below attention modules: see `JointProcessor.known`."""
    classes = {type(norm) for module in modules for norm in module.children() if type(norm).__name__ in _NORMS}
    found = {}
    for cls in classes:
        sources, keeps = _NORMS[cls.__name__]
        if cls.__module__.partition(".")[0] == "diffusers" and fingerprint(cls.forward) in sources:
            found[cls] = keeps
    return found


def _readable(norm: Any, x: Tensor, known: Mapping[type, bool]) -> bool:
    """Whether a norm is a known RMS norm whose weight may be read, and multiplies as the kernel does."""
    if type(norm) not in known:
        return False
    if norm._forward_hooks or norm._forward_pre_hooks or not is_bare(norm) or getattr(norm, "bias", None) is not None:
        return False
    weight, keeps = norm.weight, known[type(norm)]
    if weight is not None:
        if type(weight) is not nn.Parameter or weight.device != x.device:
            return False
        if weight.dtype != x.dtype and not (keeps and weight.dtype == torch.float32):
            return False
    return True


def table_reason(module: Any, tested: dict[str, set[str]], versions: str, spec: Callable[[], RopeSpec]) -> str | None:
    """Why positions cannot take the place of the tables [S, D] that a module makes of hidden states [B, C, T, H, W]; or None."""
    reason = rotary_reason(module, tested, versions)
    if reason is not None:
        return reason
    try:
        rates = torch.tensor(spec().dense(), dtype=torch.float64)[:, 0]  # [3, R]
    except ValueError as error:
        return str(error)
    sizes = (module.patch_size_t, module.patch_size, module.patch_size)
    tables = type(module).forward(module, torch.empty(1, 1, *(2 * size for size in sizes), device="cpu"))
    angles = rates.sum(0).repeat_interleave(2)  # of the last token, (1, 1, 1)
    for table, wanted in zip(tables, (angles.cos(), angles.sin()), strict=True):
        if table[-1].shape != wanted.shape or not torch.allclose(table[-1].double(), wanted, rtol=0, atol=1e-6):
            return "its tables are not those of its config"
    return None


class JointAdapter(Adapter):
    """Sites and edits of a root whose blocks attend jointly. Subclasses say which modules, and what turns. Nothing merges there.

    Attributes:
        tested, versions: sources that are known.
        arguments: of the root's forward, in order.
        processor: the class that is put in place.
        rotary_change: for the report.
    """

    package = "diffusers"
    tested: ClassVar[dict[str, set[str]]]
    versions: ClassVar[str] = "diffusers 0.36 to 0.42"
    arguments: ClassVar[tuple[str, ...]]
    processor: ClassVar[type[JointProcessor]]
    rotary_change: ClassVar[str] = FUSED

    def joint(self, root: Any) -> list[tuple[str, Any]]:
        """(path from the root, module) of each joint attention, in the order of layers."""
        raise NotImplementedError

    def others(self, root: Any) -> list[tuple[str, Any]]:
        """The same of each attention over text alone."""
        raise NotImplementedError

    def rotary(self, root: Any) -> tuple[str, nn.Module, str | None] | None:
        """(path, module, reason) of the rotation's site; None where there is no rotation."""
        raise NotImplementedError

    def spec(self, root: Any) -> RopeSpec | None:
        """Of the rotation; None where it comes with each call."""
        raise NotImplementedError

    def tokens_of(self, root: Any, given: dict[str, Any]) -> Tokens:
        """Of a call of the root."""
        raise NotImplementedError

    def rotary_edits(self, path: str, root: Any) -> list[Edit]:
        """What makes positions come in place of tables."""
        raise NotImplementedError

    def watch(self, root: Any, context: Context, rotary: Choice | None, pipeline: Any) -> Watch:
        """The hook of the root."""
        return Watch(context, self.tokens_of, self.arguments, pipeline)

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """The rotation, every joint attention, and those over text alone, where nothing can go."""
        at = f"{path}." if path else ""
        heads, width = root.config.num_attention_heads, root.config.attention_head_dim
        shape: dict[str, Any] = {"heads": heads, "kv_heads": heads, "head_dim": width}
        modules = self.joint(root)
        depth, reasons = len(modules), []
        found: list[Site] = []
        for i, (name, module) in enumerate(modules):
            reason = processor_reason(module, self.tested, self.versions)
            reasons += [reason] if reason else []
            sizes = (tokens.length,) * 2
            found.append(
                Site(at + name, module, "attention", "joint", ATTENTION, i, depth, reason=reason, tokens=sizes, **shape)
            )
        for name, module in self.others(root):
            found.append(Site(at + name, module, "attention", "text"))
        rotary = self.rotary(root)
        if rotary is None:
            return found
        name, module, reason = rotary
        reason = reasons[0] if reasons else reason
        turned = (tokens.video * depth,) * 2
        site = Site(at + name, module, "rotary", "joint", frozenset({"rotary"}), reason=reason, tokens=turned, **shape)
        return [site, *found]

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """A processor for each chosen attention; for all of them where the rotation is fused."""
        at = f"{path}." if path else ""
        modules = self.joint(root)
        known = known_norms(module for _, module in modules)

        def make(stock: Any, attend: Attend, spec: RopeSpec | None) -> JointProcessor:
            processor = self.processor(stock, attend, spec)
            processor.known = known
            return processor

        return place(
            path, root, choices, extra, make, [(at + name, module) for name, module in modules],
            spec_of=lambda: self.spec(root),
            rotary_edits=lambda: self.rotary_edits(at, root),
            watch=lambda context, rotary: self.watch(root, context, rotary, extra.pipeline),
            rotary_change=self.rotary_change,
        )  # fmt: skip

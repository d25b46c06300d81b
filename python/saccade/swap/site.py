"""`Site`: one place of a model where a kernel can go, and `Choice`: what a recipe decided about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from saccade.swap.edit import Edit
from saccade.swap.recipe import Rule
from saccade.swap.tokens import Tokens

__all__ = ["Adapter", "Choice", "Cost", "Site"]


@dataclass(frozen=True)
class Cost:
    """An estimate for one forward of one sample: floating-point operations, and bytes read and written in bf16.

    Counts what the site itself does, its linear layers left out: q.k and p.v of attention; reading and writing q and k of a rotation.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Site:
    """One module, and what could be put there.

    Args:
        path: of the module, from the model that the user gave.
        module: the module.
        kind: "attention", "rotary" or "merge".
        role: "self", "cross", "joint", "vision", "text" or "audio".
        kernels: the kernels that can go there; empty where none can.
        layer: its number, or None.
        depth: how many layers there are.
        reason: why nothing can go there, or None.
        heads, kv_heads, head_dim: of attention, for estimates; 0 where they do not apply.
        tokens: queries and keys of one call, for estimates: of the assumed video.
        groups: the queries see 1 / groups of the keys in stock (frames, windows).
    """

    path: str
    module: nn.Module
    kind: str
    role: str
    kernels: frozenset[str] = frozenset()
    layer: int | None = None
    depth: int = 1
    reason: str | None = None
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    tokens: tuple[int, int] = (0, 0)
    groups: float = 1.0


@dataclass
class Choice:
    """A site and the rules that hold there, first match first.

    Attributes:
        rules: up to the first without steps; empty: the site stays stock.
        reason: why it stays stock although a rule fits, or although it is an attention site; None where it changes.
        change: what changes, in a few words, set by the adapter.
        before, after: estimates.
    """

    site: Site
    family: str
    rules: tuple[Rule, ...] = ()
    reason: str | None = None
    change: str = ""
    before: Cost | None = None
    after: Cost | None = None

    @property
    def swapped(self) -> bool:
        """Whether something changes here."""
        return self.reason is None and bool(self.rules)

    @property
    def kernel(self) -> str:
        """The kernels, in the order of their steps."""
        names = [rule.kernel for rule in self.rules] if self.swapped else ["stock"]
        return " then ".join(dict.fromkeys(names))


class Adapter:
    """What is known of one family of models. Subclasses lie in `saccade.swap.transformers`, `.diffusers` and `.timm`.

    Attributes:
        family: the name that recipes match.
        roots: class names of the modules that hold the family's sites.
        package: that defines those classes, where another package has classes of the same name; "" for any.
        grid, text: sizes for estimates where the user gives none.
    """

    family: str = ""
    roots: tuple[str, ...] = ()
    package: str = ""
    grid: tuple[int, int, int] = (1, 1, 1)
    text: int = 0

    @property
    def denoises(self) -> bool:
        """Whether its models run once for each denoising step."""
        return self.package == "diffusers"

    def sites(self, path: str, root: nn.Module, tokens: Tokens) -> list[Site]:
        """Every attention site below a root, and the sites of other kinds, refused ones with their reason. Nothing is changed."""
        raise NotImplementedError

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """The sequence that estimates assume."""
        return Tokens(grid or self.grid, suffix=self.text if text is None else text)

    def edits(self, path: str, root: nn.Module, choices: Sequence[Choice], extra: Any) -> list[Edit]:
        """The edits that carry out what was chosen. May set `reason` on a choice, which then stays stock, and `change`.

        `extra` is an `Extra`: what the root does not tell.
        """
        raise NotImplementedError


@dataclass
class Extra:
    """What an adapter may know beyond the root, and what it leaves for the report.

    Attributes:
        pipeline: that holds the root, or None; its scheduler knows the step.
        contexts: one for each root that has one.
        model: what the user gave: the root, a pipeline, or a model that holds the root.
    """

    pipeline: Any = None
    contexts: list[Any] = field(default_factory=list)
    model: Any = None

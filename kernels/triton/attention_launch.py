"""How the attention kernels are launched: which parts of a head, strides, and the tables of a layout. Plain integers, no tensor is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from saccade._triton import launch
from saccade._triton.attention_configs import chunk

if TYPE_CHECKING:
    import torch

NONE, BOX, BITS = range(3)


class Layout(NamedTuple):
    """The tensors of a layout, in the order of the schemas."""

    starts: torch.Tensor
    counts: torch.Tensor
    indices: torch.Tensor
    p_starts: torch.Tensor | None
    p_counts: torch.Tensor | None
    p_indices: torch.Tensor | None
    p_ids: torch.Tensor | None
    bits: torch.Tensor | None
    box: torch.Tensor | None
    at: torch.Tensor | None
    q_order: torch.Tensor | None
    k_order: torch.Tensor | None

    @property
    def q_blocks(self) -> int:
        return self.counts.shape[2]

    def k_blocks(self, k_len: int, k_block: int) -> int:
        return -(-(k_len if self.k_order is None else self.k_order.shape[2]) // k_block)

    @property
    def seen(self) -> int:
        """How the partial blocks are told."""
        return NONE if self.p_counts is None else BITS if self.bits is not None else BOX

    @property
    def flags(self) -> dict[str, Any]:
        """Constants of a kernel that reads this layout."""
        return {
            "SEEN": self.seen, "AXES": self.at.shape[2] if self.seen == BOX else 1,
            "HAS_Q_ORDER": self.q_order is not None, "HAS_K_ORDER": self.k_order is not None,
        }  # fmt: skip


def layout_of(*tensors: torch.Tensor | None) -> Layout:
    """Index tensors are walked with stride 1."""
    return Layout(*(None if t is None else t.contiguous() for t in tensors))  # type: ignore[arg-type]


def shared_strides(name: str, table: torch.Tensor | None) -> dict[str, int]:
    """`<name>_stride_{b,h}` of a contiguous table; 0 where one entry serves all, or there is none."""
    of = (
        (0, 0)
        if table is None
        else (0 if n == 1 else st for n, st in zip(table.shape, table.stride()[:2], strict=False))
    )
    return dict(zip((f"{name}_stride_b", f"{name}_stride_h"), of, strict=True))


def layout_args(layout: Layout, q_blocks: int, k_len: int, q_block: int, k_block: int) -> dict[str, Any]:
    """Arguments of a kernel that reads these lists, by query or by key block. What is not there has a stand-in that is not read."""
    none = layout.counts
    pointers = {f"{name}_ptr": none if t is None else t for name, t in layout._asdict().items()}
    return {
        **pointers,
        **layout.flags,
        **shared_strides("list", layout.counts),
        **{k: v for name in ("box", "at", "q_order", "k_order") for k, v in shared_strides(name, getattr(layout, name)).items()},
        "q_positions": q_blocks * q_block,
        "k_positions": layout.k_blocks(k_len, k_block) * k_block,
        "Q_BLOCK": q_block,
        "K_BLOCK": k_block,
    }  # fmt: skip


def bias_args(
    bias: torch.Tensor | None, key_bias: torch.Tensor | None, q: torch.Tensor, lse: torch.Tensor
) -> dict[str, Any]:
    """Arguments for both biases; q and lse stand in for one that is not there."""
    of = (0, 0, 0) if bias is None else launch.strides(bias)
    align = 1 if bias is None else alignment(bias)
    return {
        "bias_ptr": q if bias is None else bias,
        "key_bias_ptr": lse if key_bias is None else key_bias,
        **dict(zip(("bias_stride_b", "bias_stride_h", "bias_stride_s"), (n // align for n in of), strict=True)),
        "BIAS_ALIGN": align,
        "key_bias_stride": 0 if key_bias is None or key_bias.shape[0] == 1 else key_bias.stride(0),
        "HAS_BIAS": bias is not None,
        "HAS_KEY_BIAS": key_bias is not None,
    }  # fmt: skip


def head_parts(head_dim: int, most: int = 256) -> dict[str, int]:
    """D, D1 and D2: the largest power of two in a head, and one that holds the rest; neither above `most`, at least 128."""
    first = 1 << (head_dim.bit_length() - 1)
    second = max(16, launch.power_of_two(head_dim - first)) if head_dim > first else 0
    if second == first:
        first, second = 2 * first, 0
    if first > most:
        first, second = most, first - most
    return {"D": head_dim, "D1": first, "D2": second}


def multiplied_parts(x: torch.Tensor, backward: bool = False) -> dict[str, int]:
    """The same, and CHUNK, for rows that are multiplied."""
    return {**head_parts(x.shape[3], 128 if x.element_size() == 4 else 256), "CHUNK": chunk(x, backward)}


def alignment(*tensors: torch.Tensor) -> int:
    """Largest power of two, at most 16 bytes, that divides every stride, in elements."""
    return launch.alignment(tensors, 16 // tensors[0].element_size())


def wide(*tensors: torch.Tensor) -> bool:
    """Whether a block of tokens spans more than 2^31 elements."""
    return any(launch.strides(x)[2] * 128 >= 2**31 for x in tensors)

"""How large the tiles of the kernels are: a table by compute capability and kind of kernel, no tuning at run time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

Capability = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """What one program holds at a time.

    Parameters
    ----------
    elements : int
        Elements of the tile: a power of two, or for "resident" the most that a program keeps.
    warps : int
        Warps of the program.
    unroll : int
        Tiles that are read before the first of them is used.
    """

    elements: int
    warps: int
    unroll: int = 1


# compute capability and what follows it -> (kind of kernel, bytes of an element) -> tile. A multiprocessor has 65536
# registers; what counts is how many bytes it waits for at a time.
TILES: dict[Capability, dict[tuple[str, int], Tile]] = {
    (7, 5): {  # half as many threads as the others
        ("elementwise", 2): Tile(4096, 4),
        ("elementwise", 4): Tile(4096, 4),
        ("sums", 2): Tile(1024, 4, unroll=4),
        ("sums", 4): Tile(1024, 4, unroll=4),
        ("resident", 2): Tile(16384, 8),  # read once and kept in registers
        ("resident", 4): Tile(16384, 8),
        ("resident_backward", 2): Tile(8192, 8),  # two tensors are kept
        ("resident_backward", 4): Tile(8192, 8),
    },
    (8, 0): {
        ("elementwise", 2): Tile(8192, 8),
        ("elementwise", 4): Tile(4096, 4),
        ("sums", 2): Tile(1024, 4, unroll=4),
        ("sums", 4): Tile(1024, 4, unroll=4),
        ("resident", 2): Tile(40960, 16),
        ("resident", 4): Tile(20480, 8),
        ("resident_backward", 2): Tile(16384, 16),
        ("resident_backward", 4): Tile(10240, 8),
    },
    (10, 0): {  # its machine code takes more registers: more elements would not stay in them
        ("elementwise", 2): Tile(8192, 8),
        ("elementwise", 4): Tile(4096, 4),
        ("sums", 2): Tile(1024, 4, unroll=4),
        ("sums", 4): Tile(1024, 4, unroll=4),
        ("resident", 2): Tile(16384, 8),
        ("resident", 4): Tile(20480, 8),
        ("resident_backward", 2): Tile(8192, 8),
        ("resident_backward", 4): Tile(10240, 8),
    },
}
INTERPRETED_AS: Capability = (9, 0)  # where there is no device


@functools.cache
def table(capability: Capability) -> dict[tuple[str, int], Tile]:
    """The tiles of a compute capability."""
    return TILES[max((oldest for oldest in TILES if oldest <= capability), default=min(TILES))]


@functools.cache
def _capability(index: int) -> Capability:
    return torch.cuda.get_device_capability(index)


def tile(kind: str, like: torch.Tensor) -> Tile:
    """The tile of a kind of kernel for a tensor's type and device."""
    capability = _capability(like.device.index) if like.is_cuda else INTERPRETED_AS
    return table(capability)[kind, like.element_size()]

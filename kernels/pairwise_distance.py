"""Pairwise squared distance within groups and its gradient. Sums are made in two passes: the same bits every time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddmd.kernels.launch import empty_float32, on, power_of_two
from ddmd.kernels.partial_sums import total
from ddmd.kernels.tiles import tile

PROGRAMS = 32768  # most programs of `pairwise_sqdist`
FEW = 512  # programs that do not fill a device
CHUNK_ROWS = 256  # fewest rows of a program, where rows are cut


@triton.jit
def centroid_fwd_kernel(
    z_ptr,  # (n, d)
    group_ptr,  # (n,) int64
    centroid_ptr,  # (G, d) float32, written
    count_ptr,  # (G,) float32, written
    n,
    d,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    blocks = tl.cdiv(d, BD)
    g = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    count = tl.zeros((BN,), tl.float32)
    start = g * 0
    while start < n:
        row = start + tl.arange(0, BN)
        mine = tl.load(group_ptr + row, row < n, other=-1) == g
        where = mine[:, None] & (column < d)[None, :]
        values = tl.load(z_ptr + row.to(tl.int64)[:, None] * d + column[None, :], where, other=0.0)
        total += tl.sum(values.to(tl.float32), 0)
        count += mine.to(tl.float32)
        start += BN
    members = tl.sum(count)
    tl.store(centroid_ptr + g.to(tl.int64) * d + column, total / tl.maximum(members, 1.0), column < d)
    tl.store(count_ptr + g, members)


@triton.jit
def _members(group_ptr, g, start, stop, groups, n, IDS: tl.constexpr):
    """Of rows [start, stop): how many are in group g, the first of those (n: none), how many in no group."""
    members = tl.zeros((IDS,), tl.int32)
    outside = tl.zeros((IDS,), tl.int32)
    first = tl.zeros((IDS,), tl.int32) + n
    while start < stop:
        row = start + tl.arange(0, IDS)
        inside = row < stop
        own = tl.load(group_ptr + row, inside, other=0)
        mine = inside & (own == g)
        members += mine.to(tl.int32)
        outside += (inside & ((own < 0) | (own >= groups))).to(tl.int32)
        first = tl.minimum(first, tl.where(mine, row, n))
        start += IDS
    return tl.sum(members), tl.min(first), tl.sum(outside)


@triton.jit
def _rows_of_group(group_ptr, g, start, stop, BN: tl.constexpr, U: tl.constexpr):
    """(U, BN) numbers of U BN rows from `start`, and which of them are in group g."""
    row = start + tl.arange(0, U)[:, None] * BN + tl.arange(0, BN)[None, :]
    return row, tl.load(group_ptr + row, row < stop, other=-1) == g


@triton.jit
def pairwise_sqdist_fwd_kernel(
    z_ptr,  # (n, d)
    group_ptr,  # (n,) int64
    partial_ptr,  # (programs,) float32, written where not SPLIT
    mean_ptr,  # (chunks, G, d) float32, written where SPLIT, as are the next two
    m2_ptr,
    count_ptr,  # (chunks, G) float32
    n,
    d,
    groups,  # G; the sum is NaN where a code's group is outside it
    chunks,
    chunk_rows,
    SPLIT: tl.constexpr,  # whether rows are cut into chunks, which another kernel merges
    BN: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
    IDS: tl.constexpr,  # rows whose groups are looked at together
):
    """n_g times the squared deviations of a group's codes from their mean; every code is read once.

    The Gram trick: sum of (z - p)^2 less the square of the sum of z - p over n_g. The pivot p is the mean of
    the group's codes among the first U BN rows from its first one, so that no common mean cancels digits.
    """
    blocks = tl.cdiv(d, BD)
    units = tl.cast(blocks, tl.int64) * groups * chunks
    unit = tl.program_id(0).to(tl.int64)
    result = tl.zeros((BD,), tl.float32)
    while unit < units:  # groups of one block of columns are beside each other
        g = (unit % groups).to(tl.int32)
        column = (unit // groups % blocks).to(tl.int32) * BD + tl.arange(0, BD)
        chunk = (unit // groups // blocks).to(tl.int32)
        inside = column < d
        stop = tl.minimum(n, (chunk + 1) * chunk_rows)
        members, start, outside = _members(group_ptr, g, chunk * chunk_rows, stop, groups, n, IDS)
        count = tl.where(outside > 0, float("nan"), members.to(tl.float32))

        row, mine = _rows_of_group(group_ptr, g, start, stop, BN, U)
        at = row.to(tl.int64)[:, :, None] * d + column[None, None, :]
        x = tl.load(z_ptr + at, mine[:, :, None] & inside[None, None, :], other=0.0)
        few = tl.maximum(tl.sum(tl.sum(mine.to(tl.float32), 0), 0), 1.0)
        pivot = (tl.sum(tl.sum(x.to(tl.float32), 0), 0) / few).to(x.dtype)
        centre = pivot.to(tl.float32)
        delta = tl.where(mine[:, :, None], x.to(tl.float32) - centre[None, None, :], 0.0)
        total = tl.sum(delta, 0)
        square = tl.sum(delta * delta, 0)
        start += U * BN
        while start < stop:
            row, mine = _rows_of_group(group_ptr, g, start, stop, BN, U)
            at = row.to(tl.int64)[:, :, None] * d + column[None, None, :]
            other = tl.broadcast_to(pivot[None, None, :], (U, BN, BD))  # what is not loaded deviates by 0
            x = tl.load(z_ptr + at, mine[:, :, None] & inside[None, None, :], other=other)
            delta = x.to(tl.float32) - centre[None, None, :]
            total += tl.sum(delta, 0)
            square += tl.sum(delta * delta, 0)
            start += U * BN
        own = tl.sum(total, 0)
        mean = own / tl.maximum(members, 1).to(tl.float32)
        m2 = tl.sum(square, 0) - own * mean
        if SPLIT:
            table = tl.cast(chunk, tl.int64) * groups + g
            tl.store(mean_ptr + table * d + column, centre + mean, inside)
            tl.store(m2_ptr + table * d + column, m2, inside)
            tl.store(count_ptr + table, count)
        else:
            result += m2 * count
        unit += tl.num_programs(0)
    if not SPLIT:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(result))


@triton.jit
def pairwise_sqdist_merge_fwd_kernel(
    mean_ptr,  # (chunks, G, d) float32
    m2_ptr,  # (chunks, G, d) float32
    count_ptr,  # (chunks, G) float32
    partial_ptr,  # (programs,) float32, written
    d,
    groups,
    chunks,
    BD: tl.constexpr,
):
    """n_g times each group's squared deviations, of its chunks' moments (Chan et al.)."""
    blocks = tl.cdiv(d, BD)
    units = tl.cast(blocks, tl.int64) * groups
    unit = tl.program_id(0).to(tl.int64)
    result = tl.zeros((BD,), tl.float32)
    while unit < units:
        g = unit % groups
        column = (unit // groups).to(tl.int32) * BD + tl.arange(0, BD)
        inside = column < d
        members = tl.sum(tl.zeros((1,), tl.float32), 0)
        mean = tl.zeros((BD,), tl.float32)
        m2 = tl.zeros((BD,), tl.float32)
        chunk = g * 0
        while chunk < chunks:
            table = chunk * groups + g
            more = tl.load(count_ptr + table)
            delta = tl.load(mean_ptr + table * d + column, inside, other=0.0) - mean
            delta = tl.where(more == 0.0, 0.0, delta)
            share = more / tl.maximum(members + more, 1.0, propagate_nan=tl.PropagateNan.ALL)
            mean += delta * share
            m2 += tl.load(m2_ptr + table * d + column, inside, other=0.0) + delta * delta * (members * share)
            members += more
            chunk += 1
        result += m2 * members
        unit += tl.num_programs(0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(result))


@triton.jit
def pairwise_sqdist_bwd_kernel(
    grad_ptr,  # () float32
    z_ptr,  # (n, d)
    group_ptr,  # (n,) int64
    centroid_ptr,  # (G, d) float32
    count_ptr,  # (G,) float32
    d_z_ptr,  # (n, d), written
    n,
    d,
    groups,  # G; NaN is written for a code whose group is outside it
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    blocks = tl.cdiv(d, BD)
    row = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    column = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    group = tl.load(group_ptr + row, row < n, other=0)
    valid = (group >= 0) & (group < groups) & (row < n)
    count = tl.load(count_ptr + group, valid, other=float("nan"))
    weight = count * (2.0 * tl.load(grad_ptr).to(tl.float32))
    where = (row < n)[:, None] & (column < d)[None, :]
    at = row.to(tl.int64)[:, None] * d + column[None, :]
    values = tl.load(z_ptr + at, where, other=0.0).to(tl.float32)
    centre = tl.load(centroid_ptr + group[:, None] * d + column[None, :], where & valid[:, None], other=0.0)
    tl.store(d_z_ptr + at, (weight[:, None] * (values - centre)).to(d_z_ptr.dtype.element_ty), where)


def _tile(d: int) -> tuple[int, int]:
    columns = min(power_of_two(d), 128)
    return max(1, 4096 // columns) if columns >= 32 else 128, columns


def _centroids(z: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    n, d = z.shape
    centroid = empty_float32((num_groups, d), z)
    count = empty_float32((num_groups,), z)
    rows, columns = _tile(d)
    centroid_fwd_kernel[(num_groups * triton.cdiv(d, columns),)](
        z, group, centroid, count, n, d, rows, columns
    )
    return centroid, count


def _chunk_rows(n: int, units: int) -> int:
    """Rows of a program: all of them, or fewer where that leaves the device without work."""
    if units >= FEW or n <= 2 * CHUNK_ROWS:
        return n
    most = min(triton.cdiv(FEW, units), n // CHUNK_ROWS)
    return triton.cdiv(n, most)


def pairwise_sqdist(z: Tensor, group: Tensor, num_groups: int) -> Tensor:
    n, d = z.shape
    if z.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=z.device)
    z, group = z.contiguous(), group.contiguous()
    sizes = tile("sums", z)
    columns = min(power_of_two(d), 512 // z.element_size())
    rows = sizes.elements // columns
    units = num_groups * triton.cdiv(d, columns)
    chunk_rows = _chunk_rows(n, units)
    chunks = triton.cdiv(n, chunk_rows)
    partial = empty_float32((min(units, PROGRAMS),), z)
    mean = m2 = count = partial
    if chunks > 1:
        mean, m2 = (empty_float32((chunks, num_groups, d), z) for _ in range(2))
        count = empty_float32((chunks, num_groups), z)
    with on(z):
        pairwise_sqdist_fwd_kernel[(min(units * chunks, PROGRAMS),)](
            z, group, partial, mean, m2, count, n, d, num_groups, chunks, chunk_rows, chunks > 1, rows, columns,
            sizes.unroll, min(power_of_two(n), 1024), num_warps=sizes.warps,
        )  # fmt: skip
        if chunks > 1:
            pairwise_sqdist_merge_fwd_kernel[(len(partial),)](
                mean, m2, count, partial, d, num_groups, chunks, columns
            )
        return total(partial, 1.0)


def pairwise_sqdist_backward(grad: Tensor, z: Tensor, group: Tensor, num_groups: int) -> Tensor:
    n, d = z.shape
    z, group = z.contiguous(), group.contiguous()
    d_z = torch.empty_like(z)
    if z.numel():
        rows, columns = _tile(d)
        with on(z):
            centroid, count = _centroids(z, group, num_groups)
            grid = triton.cdiv(n, rows) * triton.cdiv(d, columns)
            pairwise_sqdist_bwd_kernel[(grid,)](
                grad, z, group, centroid, count, d_z, n, d, num_groups, rows, columns
            )
    return d_z

"""The discrepancy losses: KL of diagonal Gaussians and pairwise squared distance within groups.

Sums are made in two passes, partial sums first, so that the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddmd.kernels.launch import empty_float32, on, power_of_two

BLOCK = 1024
PARTIALS = 512  # most programs of a first pass


@triton.jit
def gaussian_kl_fwd_kernel(
    mu_q_ptr,  # (n,)
    logvar_q_ptr,  # (n,)
    mu_p_ptr,  # (n,)
    logvar_p_ptr,  # (n,)
    out_ptr,  # (n,) float32 where ELEMENTWISE, else (programs,) float32 partial sums
    n,
    ELEMENTWISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    programs = tl.num_programs(0)
    total = tl.zeros((BLOCK,), tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        mu_q = tl.load(mu_q_ptr + at, inside, other=0.0).to(tl.float32)
        logvar_q = tl.load(logvar_q_ptr + at, inside, other=0.0).to(tl.float32)
        mu_p = tl.load(mu_p_ptr + at, inside, other=0.0).to(tl.float32)
        logvar_p = tl.load(logvar_p_ptr + at, inside, other=0.0).to(tl.float32)
        difference = mu_q - mu_p
        kl = 0.5 * (
            logvar_p
            - logvar_q
            + tl.exp(logvar_q - logvar_p)
            + difference * difference * tl.exp(-logvar_p)
            - 1.0
        )
        if ELEMENTWISE:
            tl.store(out_ptr + at, kl, inside)
        else:
            total += tl.where(inside, kl, 0.0)
        start += programs.to(tl.int64) * BLOCK
    if not ELEMENTWISE:
        tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def gaussian_kl_bwd_kernel(
    grad_ptr,  # (n,) where ELEMENTWISE, else ()
    mu_q_ptr,  # (n,), as are the next three
    logvar_q_ptr,
    mu_p_ptr,
    logvar_p_ptr,
    d_mu_q_ptr,  # (n,), written, as are the next three
    d_logvar_q_ptr,
    d_mu_p_ptr,
    d_logvar_p_ptr,
    scale,
    n,
    ELEMENTWISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    if ELEMENTWISE:
        grad = tl.load(grad_ptr + at, inside, other=0.0).to(tl.float32)
    else:
        grad = tl.load(grad_ptr).to(tl.float32) * scale
    mu_q = tl.load(mu_q_ptr + at, inside, other=0.0).to(tl.float32)
    logvar_q = tl.load(logvar_q_ptr + at, inside, other=0.0).to(tl.float32)
    mu_p = tl.load(mu_p_ptr + at, inside, other=0.0).to(tl.float32)
    logvar_p = tl.load(logvar_p_ptr + at, inside, other=0.0).to(tl.float32)
    difference = mu_q - mu_p
    precision = tl.exp(-logvar_p)
    ratio = tl.exp(logvar_q - logvar_p)
    d_mu = grad * difference * precision
    tl.store(d_mu_q_ptr + at, d_mu.to(d_mu_q_ptr.dtype.element_ty), inside)
    tl.store(d_mu_p_ptr + at, (-d_mu).to(d_mu_p_ptr.dtype.element_ty), inside)
    d_q = grad * 0.5 * (ratio - 1.0)
    tl.store(d_logvar_q_ptr + at, d_q.to(d_logvar_q_ptr.dtype.element_ty), inside)
    d_p = grad * 0.5 * (1.0 - ratio - difference * difference * precision)
    tl.store(d_logvar_p_ptr + at, d_p.to(d_logvar_p_ptr.dtype.element_ty), inside)


@triton.jit
def sum_fwd_kernel(partial_ptr, out_ptr, n, scale, BLOCK: tl.constexpr):
    """() float32: the partial sums (n,) in a fixed order, times scale."""
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(partial_ptr + i, i < n, other=0.0)) * scale)


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
    g = tl.program_id(0)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
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
def pairwise_sqdist_fwd_kernel(
    z_ptr,  # (n, d)
    group_ptr,  # (n,) int64
    centroid_ptr,  # (G, d) float32
    count_ptr,  # (G,) float32
    partial_ptr,  # (programs,) float32, written
    n,
    d,
    groups,  # G; the sum is NaN where a code's group is outside it
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    group = tl.load(group_ptr + row, row < n, other=0)
    valid = (group >= 0) & (group < groups)
    count = tl.load(count_ptr + group, (row < n) & valid, other=float("nan"))
    count = tl.where(row < n, count, 0.0)
    total = tl.zeros((BN,), tl.float32)
    start = tl.program_id(0) * 0
    while start < d:
        column = start + tl.arange(0, BD)
        where = (row < n)[:, None] & (column < d)[None, :]
        values = tl.load(z_ptr + row.to(tl.int64)[:, None] * d + column[None, :], where, other=0.0).to(
            tl.float32
        )
        known = where & valid[:, None]
        centre = tl.load(centroid_ptr + group[:, None] * d + column[None, :], known, other=0.0)
        total += tl.sum((values - centre) * (values - centre), 1)
        start += BD
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total * count))


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
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    group = tl.load(group_ptr + row, row < n, other=0)
    valid = (group >= 0) & (group < groups) & (row < n)
    count = tl.load(count_ptr + group, valid, other=float("nan"))
    weight = count * (2.0 * tl.load(grad_ptr).to(tl.float32))
    where = (row < n)[:, None] & (column < d)[None, :]
    at = row.to(tl.int64)[:, None] * d + column[None, :]
    values = tl.load(z_ptr + at, where, other=0.0).to(tl.float32)
    centre = tl.load(centroid_ptr + group[:, None] * d + column[None, :], where & valid[:, None], other=0.0)
    tl.store(d_z_ptr + at, (weight[:, None] * (values - centre)).to(d_z_ptr.dtype.element_ty), where)


def _total(partial: Tensor, scale: float) -> Tensor:
    out = empty_float32((), partial)
    sum_fwd_kernel[(1,)](partial, out, len(partial), scale, power_of_two(len(partial)))
    return out


def gaussian_kl(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str = "sum"
) -> Tensor:
    n, each = mu_q.numel(), [t.contiguous() for t in (mu_q, logvar_q, mu_p, logvar_p)]
    if reduction == "none":
        out = empty_float32(mu_q.shape, mu_q)
        if n:
            with on(mu_q):
                gaussian_kl_fwd_kernel[(triton.cdiv(n, BLOCK),)](*each, out, n, True, BLOCK)
        return out
    scale = 1.0 if reduction == "sum" else (1.0 / n if n else float("nan"))
    if not n:
        return torch.full((), 0.0 if reduction == "sum" else scale, dtype=torch.float32, device=mu_q.device)
    programs = min(triton.cdiv(n, BLOCK), PARTIALS)
    partial = empty_float32((programs,), mu_q)
    with on(mu_q):
        gaussian_kl_fwd_kernel[(programs,)](*each, partial, n, False, BLOCK)
        return _total(partial, scale)


def gaussian_kl_backward(
    grad: Tensor, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, each = mu_q.numel(), [t.contiguous() for t in (mu_q, logvar_q, mu_p, logvar_p)]
    a, b, c, d = (torch.empty_like(t) for t in each)
    if n:
        scale = 1.0 / n if reduction == "mean" else 1.0
        with on(mu_q):
            gaussian_kl_bwd_kernel[(triton.cdiv(n, BLOCK),)](
                grad.contiguous(), *each, a, b, c, d, scale, n, reduction == "none", BLOCK
            )
    return a, b, c, d


def _tile(d: int) -> tuple[int, int]:
    columns = min(power_of_two(d), 128)
    return max(1, 4096 // columns) if columns >= 32 else 128, columns


def _centroids(z: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    n, d = z.shape
    centroid = empty_float32((num_groups, d), z)
    count = empty_float32((num_groups,), z)
    rows, columns = _tile(d)
    centroid_fwd_kernel[(num_groups, triton.cdiv(d, columns))](z, group, centroid, count, n, d, rows, columns)
    return centroid, count


def pairwise_sqdist(z: Tensor, group: Tensor, num_groups: int) -> Tensor:
    n, d = z.shape
    if z.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=z.device)
    z, group = z.contiguous(), group.contiguous()
    rows, columns = _tile(d)
    with on(z):
        centroid, count = _centroids(z, group, num_groups)
        partial = empty_float32((triton.cdiv(n, rows),), z)
        pairwise_sqdist_fwd_kernel[(len(partial),)](
            z, group, centroid, count, partial, n, d, num_groups, rows, columns
        )
        return _total(partial, 1.0)


def pairwise_sqdist_backward(grad: Tensor, z: Tensor, group: Tensor, num_groups: int) -> Tensor:
    n, d = z.shape
    z, group = z.contiguous(), group.contiguous()
    d_z = torch.empty_like(z)
    if z.numel():
        rows, columns = _tile(d)
        with on(z):
            centroid, count = _centroids(z, group, num_groups)
            grid = (triton.cdiv(n, rows), triton.cdiv(d, columns))
            pairwise_sqdist_bwd_kernel[grid](
                grad, z, group, centroid, count, d_z, n, d, num_groups, rows, columns
            )
    return d_z

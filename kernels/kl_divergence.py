"""KL of diagonal Gaussians and its gradients. Sums are made in two passes, so that the bits are the same every time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddmd.kernels.launch import empty_float32, on
from ddmd.kernels.partial_sums import total

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
        return total(partial, scale)


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

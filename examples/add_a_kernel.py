"""Add an op of your own beside those of ddmd: definition, Triton kernel, gradient, comparison: `python examples/add_a_kernel.py`.

The op is the Bernoulli variance p (1 - p) of a probability map. The uncertainty of ddmd, the variance over drawn masks, is
compared with it. Without a GPU, Triton's interpreter runs the kernel. CONTRIBUTING.md has the recipe for an op inside ddmd.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl
from torch import Tensor

from ddmd import ops

BLOCK = 1024  # elements of one program


def reference(p: Tensor) -> Tensor:
    """The definition, in plain PyTorch: p (1 - p) in float32."""
    p = p.float()
    return p * (1.0 - p)


@triton.jit
def bernoulli_variance_fwd_kernel(p_ptr, out_ptr, count, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK  # 64-bit starts: a map may have 2^31 elements
    position = first + tl.arange(0, BLOCK)
    inside = position < count
    p = tl.load(p_ptr + position, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + position, p * (1.0 - p), inside)


@torch.library.custom_op("ddmd_example::bernoulli_variance", mutates_args=())
def bernoulli_variance(p: Tensor) -> Tensor:
    """p (1 - p) of a probability map of any shape and floating type, as float32."""
    if not p.is_floating_point():
        raise TypeError(f"bernoulli_variance: p is {p.dtype}; allowed are floating types")
    p = p.contiguous()
    out = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    if p.numel():
        bernoulli_variance_fwd_kernel[(triton.cdiv(p.numel(), BLOCK),)](p, out, p.numel(), BLOCK)
    return out


@bernoulli_variance.register_fake
def _(p: Tensor) -> Tensor:
    return torch.empty(p.shape, dtype=torch.float32, device=p.device)


def _keep(ctx, inputs, output) -> None:  # what the gradient needs
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad: Tensor) -> Tensor:
    (p,) = ctx.saved_tensors
    return (grad * (1.0 - 2.0 * p.float())).to(p.dtype)


bernoulli_variance.register_autograd(_gradient, setup_context=_keep)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    # Compare with the definition: every type, and shapes that are odd, empty or strided.
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)):
        for shape in ((7, 13), (0, 3), (3, 1025)):
            p = torch.rand(shape, generator=generator, dtype=torch.float32, device=device).to(dtype)
            for view in (p, p.T):
                error = (bernoulli_variance(view) - reference(view)).abs()
                assert not error.numel() or error.max() <= tolerance, (dtype, shape)

    # What PyTorch asks of an op: schema, shapes, gradient.
    p = torch.rand(5, 7, generator=generator, dtype=torch.float32, device=device, requires_grad=True)
    torch.library.opcheck(bernoulli_variance, (p,))

    # Beside an op of ddmd: mean and variance over 6 masks, and what the mean alone says of the variance.
    masks = (torch.rand(6, 1, 32, 32, generator=generator, device=device) < 0.3).float()
    mean, variance = ops.ensemble_variance(masks, correction=0)
    difference = (variance - torch.ops.ddmd_example.bernoulli_variance(mean)).abs().max()
    print(f"masks of 0 and 1 have the variance p (1 - p): largest difference {difference:.1e}")


if __name__ == "__main__":
    main()

"""Gradients of the ops that networks are trained through, registered so that torch.func.grad works, too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._functorch import autograd_function as functorch_autograd


def _kl_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.reduction = inputs[4]


def _kl_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.ddmd.gaussian_kl_backward(grad, *ctx.saved_tensors, ctx.reduction), None


def _pairs_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.num_groups = inputs[2]


def _pairs_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.ddmd.pairwise_sqdist_backward(grad, *ctx.saved_tensors, ctx.num_groups), None, None


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.num_groups, weight, bias, scale, shift, residual, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(x, weight, bias, scale, shift, output[1], output[2])
    ctx.residual_dtype = None if residual is None else residual.dtype


def _norm_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
    d_x, d_weight, d_bias, d_scale, d_shift = torch.ops.ddmd.group_norm_silu_backward(
        grad, x, ctx.num_groups, weight, bias, scale, shift, mean, rstd
    )
    return (
        d_x,
        None,
        d_weight.to(weight.dtype),
        d_bias.to(bias.dtype),
        None if scale is None else d_scale.to(scale.dtype),
        None if shift is None else d_shift.to(shift.dtype),
        None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype),
        None,
    )


# op -> what its forward call keeps, and its gradient
GRADIENTS: dict[str, tuple[Callable[..., None], Callable[..., tuple[Tensor | None, ...]]]] = {
    "gaussian_kl": (_kl_setup, _kl_backward),
    "pairwise_sqdist": (_pairs_setup, _pairs_backward),
    "group_norm_silu": (_norm_setup, _norm_backward),
}


def register_gradient(
    library: Any, op: str, chosen: Callable[[], str], backend: Callable[[str], AbstractContextManager[None]]
) -> None:
    """Give an op its gradient: what `torch.library.register_autograd` does, and for torch.func.grad too.

    The gradient is run by the backend of its forward call, since autograd may run it in another thread: `chosen`
    says which that is, and `backend` chooses one.
    """
    setup, backward = GRADIENTS[op]
    overload = getattr(torch.ops.ddmd, op).default
    defaults = [a.default_value if a.has_default_value() else None for a in overload._schema.arguments]

    def below(keys: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *args)

    class Gradient(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keys: Any, *args: Any) -> Any:
            result = below(keys, args)
            ctx.backend = chosen()
            setup(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if ctx.backend == chosen():
                return None, *backward(ctx, *grads)
            with backend(ctx.backend):
                return None, *backward(ctx, *grads)

    Gradient.__name__ = Gradient.__qualname__ = f"{op}_gradient"
    apply = Gradient.apply  # type: ignore[attr-defined]

    def call(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            args = (*args, *defaults[len(args) :])  # the dispatcher leaves out what is the default
            if torch._C._are_functorch_transforms_active():
                with functorch_autograd.enable_single_level_autograd_function():  # type: ignore[attr-defined]
                    return apply(keys, *args)
            return apply(keys, *args)
        return below(keys, args)

    library.impl(op, call, "Autograd", with_keyset=True)

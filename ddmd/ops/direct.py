"""Whether a call needs PyTorch's dispatcher, whose way to an op in Python takes longer than a small op itself.

It does where something beside the op takes part: gradients, torch.compile and other tracers, torch.func, modes and
subclasses that see calls, the profiler, tensors that are views by formula (negative, zero, functional).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = frozenset((Tensor, Parameter))
_has_function_mode = torch._C._is_torch_function_mode_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_function_transform = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_has_profiler = torch._C._autograd._profiler_enabled
_is_functional = torch._is_functional_tensor


def is_unobserved(tensors: Sequence[Tensor | None], required: int) -> bool:
    """Whether nothing but the op would take part in a call on these tensors, so that it may be called directly.

    False, too, where one of the first `required` tensors is None.
    """
    if (
        _has_function_mode()
        or _dispatch_modes()
        or _has_function_transform()
        or _tracing_state() is not None
        or _has_profiler()
    ):
        return False
    recorded = torch.is_grad_enabled()
    for tensor in tensors:
        required -= 1
        if tensor is None:
            if required >= 0:
                return False
            continue
        if type(tensor) not in _PLAIN or (recorded and tensor.requires_grad):
            return False
        if tensor.is_neg() or tensor._is_zerotensor() or _is_functional(tensor):
            return False
    return True

"""The C++ and CUDA ops for tensors: pointers and strides go in, the module `ddmd._C` does the work.

Functions have the names and arguments of `ddmd.ops.reference`; `ddmd.ops.checks` has checked the arguments.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddmd.ops import reference

_INTERFACE = 2  # of csrc/bindings.cpp: functions of another one take other arguments


def _load() -> tuple[Any, str | None]:
    """The extension, or why there is none that can be called."""
    try:
        extension = importlib.import_module("ddmd._C")
    except ImportError as error:
        return None, f"the extension ddmd._C is not built ({error}); run pip install ."
    if getattr(extension, "interface", None) != _INTERFACE:
        return None, "the extension ddmd._C is of another version of ddmd; run pip install ."
    return extension, None


_C, _REASON = _load()


def _use_torch_threads() -> bool:
    """Run on the OpenMP threads torch already has: a second set would wait busily against the first."""
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")):
        try:
            address = ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
        _C.use_openmp(address)
        return True
    return False


_USES_TORCH_THREADS = _C is not None and _use_torch_threads()

_MAX_CHANNELS = 4096  # of GroupNorm: the size of the scratch in csrc/group_norm.cpp
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(device: str = "cpu", op: str | None = None) -> str | None:
    """Why the C++ ops, or one of them, do not serve a device, or None where they do."""
    if _C is not None and device == "cuda" and not _C.build_info()["cuda"]:
        return "ddmd._C was built without CUDA; set DDMD_CUDA=ON and install again"
    if _C is not None and device == "cpu" and op is not None and not hasattr(_C, op):
        return f"ddmd._C is of an older version, which had no {op}; run pip install ."
    return _REASON


def build_info() -> dict[str, Any]:
    """What ddmd._C was built with: compiler, instruction sets, CUDA version and architectures."""
    return {} if _C is None else dict(_C.build_info())


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _stream(x: Tensor) -> int:
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised float32 result, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _float(x: Tensor) -> Tensor:
    if x.dtype is torch.float32 and x.is_contiguous():
        return x
    return x.to(torch.float32).contiguous()


def _float_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else _float(x)


def philox(counters: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 words of counters (n, 4) int32, as int32: for tests of the stream."""
    counters = counters.contiguous()
    words = torch.empty_like(counters)
    _C.philox(counters.data_ptr(), seed, words.data_ptr(), len(counters))
    return words


def ensemble_variance(
    samples: Tensor, correction: int = 1, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance; `out` reuses contiguous float32 buffers."""
    shape, strides = list(samples.shape[1:]), list(samples.stride()[1:])
    mean, variance = out or (_empty(shape, samples), _empty(shape, samples))
    count, stride, kind = samples.shape[0], samples.stride(0), _TYPES[samples.dtype]
    if samples.device.type == "cuda":
        with torch.cuda.device(samples.device):
            _C.cuda_ensemble(
                samples.data_ptr(), kind, count, stride, shape, strides, mean.numel(), correction,
                mean.data_ptr(), variance.data_ptr(), 0, False, _stream(samples),
            )  # fmt: skip
    else:
        _C.ensemble_variance(
            samples.data_ptr(), kind, count, stride, shape, strides, correction,
            mean.data_ptr(), variance.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return mean, variance


def ensemble_update(mean: Tensor, m2: Tensor, count: int, samples: Tensor) -> None:
    shape, strides = list(samples.shape[1:]), list(samples.stride()[1:])
    new, stride, kind = samples.shape[0], samples.stride(0), _TYPES[samples.dtype]
    if new == 0 or mean.numel() == 0:
        return
    if samples.device.type == "cuda":
        with torch.cuda.device(samples.device):
            _C.cuda_ensemble(
                samples.data_ptr(), kind, new, stride, shape, strides, mean.numel(), 0,
                mean.data_ptr(), m2.data_ptr(), count, True, _stream(samples),
            )  # fmt: skip
    else:
        _C.ensemble_update(
            mean.data_ptr(), m2.data_ptr(), count, samples.data_ptr(), kind, new, stride, shape, strides,
            torch.get_num_threads(),
        )  # fmt: skip


def ensemble_merge(
    mean: Tensor, m2: Tensor, count: int, other_mean: Tensor, other_m2: Tensor, other_count: int
) -> None:
    if other_count == 0 or mean.numel() == 0:
        return
    pointers = (
        mean.data_ptr(),
        m2.data_ptr(),
        count,
        other_mean.data_ptr(),
        other_m2.data_ptr(),
        other_count,
    )
    if mean.device.type == "cuda":
        with torch.cuda.device(mean.device):
            _C.cuda_merge(*pointers, mean.numel(), _stream(mean))
    else:
        _C.ensemble_merge(*pointers, mean.numel(), torch.get_num_threads())


def _row_size(x: Tensor) -> int:
    return x.numel() // max(x.shape[0], 1)


def denoise_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
    x0: Tensor | None = None,
) -> None:
    if x.numel() == 0:
        return
    dtype = x.dtype if x0 is None or x0.dtype == x.dtype else torch.float32  # the core has one type for both
    state = x.to(dtype).contiguous()
    previous = None if x0 is None else x0.to(dtype).contiguous()
    output, table = output.contiguous(), _float(table)
    sample, slice_index = sample.contiguous(), slice_index.contiguous()
    _C.denoise_step(
        state.data_ptr(), _TYPES[dtype], output.data_ptr(), _TYPES[output.dtype], _pointer(previous),
        table.data_ptr(), int(step), int(seed), sample.data_ptr(), slice_index.data_ptr(), x.shape[0],
        _row_size(x), torch.get_num_threads(),
    )  # fmt: skip
    if state is not x:
        x.copy_(state)
    if x0 is not None and previous is not None and previous is not x0:
        x0.copy_(previous)


def noise(
    x0: Tensor, t: Tensor, table: Tensor, step: Tensor, seed: Tensor, sample: Tensor, slice_index: Tensor
) -> Tensor:
    out = torch.empty_like(x0, memory_format=torch.contiguous_format)
    if x0.numel() == 0:
        return out
    x0, t, table = x0.contiguous(), t.contiguous(), _float(table)
    sample, slice_index = sample.contiguous(), slice_index.contiguous()
    _C.noise(
        x0.data_ptr(), out.data_ptr(), _TYPES[x0.dtype], t.data_ptr(), table.data_ptr(), int(step), int(seed),
        sample.data_ptr(), slice_index.data_ptr(), x0.shape[0], _row_size(x0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def pure_noise(
    shape: Sequence[int],
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = dtype or torch.float32
    out = torch.empty(tuple(shape), dtype=dtype, device=sample.device)
    if out.numel() == 0:
        return out
    sample, slice_index = sample.contiguous(), slice_index.contiguous()
    _C.pure_noise(
        out.data_ptr(), _TYPES[dtype], int(step), int(seed), sample.data_ptr(), slice_index.data_ptr(),
        out.shape[0], _row_size(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def discrepancy_maps(
    recon_a: Tensor, recon_b: Tensor, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """X and Y; `out` reuses contiguous float32 buffers."""
    recon_a, recon_b = recon_a.contiguous(), recon_b.contiguous()
    members, z, c, h, w = recon_a.shape
    inter, intra = out or (_empty((z, 1, h, w), recon_a), _empty((z, 1, h, w), recon_a))
    _C.discrepancy_maps(
        recon_a.data_ptr(), recon_b.data_ptr(), _TYPES[recon_a.dtype], members, recon_b.shape[0], z, c,
        h * w, inter.data_ptr(), intra.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return inter, intra


def _one_type(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, contiguous and of one dtype: float32 where they differ."""
    first = tensors[0].dtype
    dtype = first if all(t.dtype == first for t in tensors) else torch.float32
    return [t.to(dtype).contiguous() for t in tensors]


def gaussian_kl(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str = "sum"
) -> Tensor:
    size, each = mu_q.numel(), reduction == "none"
    out = _empty(mu_q.shape if each else (), mu_q)
    scale = 1.0 if reduction != "mean" else (1.0 / size if size else float("nan"))
    q = _one_type((mu_q, logvar_q, mu_p, logvar_p))
    _C.gaussian_kl(
        *(t.data_ptr() for t in q), _TYPES[q[0].dtype], size, scale, each, out.data_ptr(), torch.get_num_threads()
    )  # fmt: skip
    return out


def gaussian_kl_backward(
    grad: Tensor, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (mu_q, logvar_q, mu_p, logvar_p)
    q = _one_type(inputs)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in q]
    size, grad = mu_q.numel(), _float(grad)
    _C.gaussian_kl_backward(
        grad.data_ptr(), reduction == "none", 1.0 / max(size, 1) if reduction == "mean" else 1.0,
        *(t.data_ptr() for t in q), _TYPES[q[0].dtype], size, *(t.data_ptr() for t in grads), torch.get_num_threads(),
    )  # fmt: skip
    a, b, c, d = (g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))
    return a, b, c, d


def pairwise_sqdist(z: Tensor, group: Tensor, num_groups: int) -> Tensor:
    out = _empty((), z)
    z, group = z.contiguous(), group.contiguous()
    _C.pairwise_sqdist(
        z.data_ptr(), _TYPES[z.dtype], *z.shape, group.data_ptr(), num_groups, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def pairwise_sqdist_backward(grad: Tensor, z: Tensor, group: Tensor, num_groups: int) -> Tensor:
    z, group = z.contiguous(), group.contiguous()
    d_z = torch.empty_like(z)
    _C.pairwise_sqdist_backward(
        float(grad), z.data_ptr(), _TYPES[z.dtype], *z.shape, group.data_ptr(), num_groups, d_z.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return d_z


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape
    if shape[1] > _MAX_CHANNELS or 0 in shape:
        return reference.group_norm_silu(x, num_groups, weight, bias, scale, shift, residual, eps)
    mean = _empty((shape[0], num_groups), x)
    rstd = torch.empty_like(mean)
    y = _normalised(
        x, num_groups, weight, bias, scale, shift, residual, eps, mean.data_ptr(), rstd.data_ptr()
    )
    return y, mean, rstd


def group_norm_silu_result(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """`group_norm_silu` without the statistics, which only its gradient needs."""
    shape = x.shape
    if shape[1] > _MAX_CHANNELS or 0 in shape:
        return reference.group_norm_silu(x, num_groups, weight, bias, scale, shift, residual, eps)
    return (_normalised(x, num_groups, weight, bias, scale, shift, residual, eps, 0, 0),)


def _normalised(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    eps: float,
    mean: int,
    rstd: int,
) -> Tensor:
    """The result; its statistics are written to the addresses mean and rstd, where those are not 0."""
    shape = x.shape
    n, channels = shape[0], shape[1]
    if x.is_contiguous():
        last = False
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        layout = reference.norm_layout(x)
        last = layout is torch.channels_last
        x = x.contiguous(memory_format=layout)
        y = torch.empty_like(x, memory_format=layout)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    weight, bias, scale, shift = _float(weight), _float(bias), _float_or_none(scale), _float_or_none(shift)
    _C.group_norm_silu(
        x.data_ptr(), _TYPES[x.dtype], last, n, channels, x.numel() // (n * channels), num_groups,
        weight.data_ptr(), bias.data_ptr(), _pointer(scale), _pointer(shift), _pointer(residual), eps,
        y.data_ptr(), mean, rstd, torch.get_num_threads(),
    )  # fmt: skip
    return y


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, channels = x.shape[:2]
    if channels > _MAX_CHANNELS or x.numel() == 0:
        return reference.group_norm_silu_backward(grad, x, num_groups, weight, bias, scale, shift, mean, rstd)
    layout = reference.norm_layout(x)
    x = x.contiguous(memory_format=layout)
    grad = grad.to(x.dtype).contiguous(memory_format=layout)
    weight, bias, mean, rstd = _float(weight), _float(bias), _float(mean), _float(rstd)
    scale, shift = _float_or_none(scale), _float_or_none(shift)
    d_x = torch.empty_like(x, memory_format=layout)
    d_weight, d_scale = _empty((channels,), x), _empty((n, channels), x)
    d_bias, d_shift = torch.empty_like(d_weight), torch.empty_like(d_scale)
    _C.group_norm_silu_backward(
        grad.data_ptr(), x.data_ptr(), _TYPES[x.dtype], layout is torch.channels_last, n, channels,
        x.numel() // (n * channels), num_groups, weight.data_ptr(), bias.data_ptr(), _pointer(scale), _pointer(shift),
        mean.data_ptr(), rstd.data_ptr(), d_x.data_ptr(), d_weight.data_ptr(), d_bias.data_ptr(), d_scale.data_ptr(),
        d_shift.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return d_x, d_weight, d_bias, d_scale, d_shift

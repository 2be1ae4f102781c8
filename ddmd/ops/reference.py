"""Every op of ddmd in plain torch, accumulating in float32: what "correct" means.

Tests and benchmarks compare every other backend with these functions. Each takes and returns
exactly what the function of the same name in `ddmd.ops` does; `ddmd.ops.checks` has checked them.
float64 input is computed in float64, so that the reference itself can be held against it.

Letters of shapes: R rows (one sample of one slice each), S samples, Z slices, C sequences or
channels, K members, H, W.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # Philox4x32 multipliers (Salmon et al., SC 2011)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl key increments
_MASK = 0xFFFFFFFF

# Columns of the coefficient table of `denoise_step`, one row a sampling step.
COLUMNS = ("x0_from_x", "x0_from_output", "to_x0", "to_x", "to_output", "to_previous", "sigma", "clip")


def upcast(x: Tensor) -> Tensor:
    """The tensor in the type it is accumulated in: float64 stays, everything else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words (in int64) for each 128-bit counter and 64-bit key.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # int64 wraps modulo 2^64: both halves come out right
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def normal(
    row_size: int,
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal draws (R, row_size) that depend on nothing but their five coordinates.

    Element e of a row is output e % 4 of Philox with key = seed and
    counter = (e // 4, step, sample, slice), by Box-Muller on words (0, 1) and (2, 3):
    u = ((r >> 8) + 1) / 2^24 in (0, 1], v = (r' >> 8) / 2^24,
    z = sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v).
    """
    device = sample.device
    position = torch.arange((row_size + 3) // 4, dtype=torch.int64, device=device)[None, :]
    seed, step = seed.to(device), step.to(device)
    zero = torch.zeros_like(position)
    words = philox(
        (
            position + torch.zeros_like(sample)[:, None],
            (step & _MASK) + zero,
            (sample & _MASK)[:, None] + zero,
            (slice_index & _MASK)[:, None] + zero,
        ),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    uniform = [(w >> 8).to(dtype) * 2.0**-24 for w in words]
    pairs = []
    for u, v in ((uniform[0], uniform[1]), (uniform[2], uniform[3])):
        radius, angle = torch.sqrt(-2.0 * torch.log(u + 2.0**-24)), 2.0 * math.pi * v
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :row_size]


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def noise(
    x0: Tensor, t: Tensor, table: Tensor, step: Tensor, seed: Tensor, sample: Tensor, slice_index: Tensor
) -> Tensor:
    """q(x_t | x_0): table[t, 0] x_0 + table[t, 1] z, with z from `normal`."""
    x = upcast(x0)
    z = normal(x0[0].numel() if len(x0) else 0, step, seed, sample, slice_index, x.dtype)
    rows = table.to(x.dtype)[t]
    x_t = _per_row(rows[:, 0], x) * x + _per_row(rows[:, 1], x) * z.reshape(x.shape)
    return x_t.to(x0.dtype).contiguous()


def pure_noise(
    shape: Sequence[int],
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x_T, which is z from `normal` itself; float32 where no type is given."""
    dtype = dtype or torch.float32
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    z = normal(math.prod(shape[1:]), step, seed, sample, slice_index, accumulated)
    return z.reshape(tuple(shape)).to(dtype).contiguous()


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
    """One sampling update of x in place, by row `step` of the table (columns: `COLUMNS`).

    predicted = x0_from_x x + x0_from_output output, clamped to [-clip, clip];
    x <- to_x0 predicted + to_x x + to_output output + to_previous x0 + sigma z; x0 <- predicted.
    """
    state, out = upcast(x), upcast(output)
    x0_from_x, x0_from_output, to_x0, to_x, to_output, to_previous, sigma, clip = table.to(state.dtype)[
        step
    ].unbind()
    predicted = torch.clamp(x0_from_x * state + x0_from_output * out, -clip, clip)
    z = normal(x[0].numel() if len(x) else 0, step, seed, sample, slice_index, state.dtype)
    new = to_x0 * predicted + to_x * state + to_output * out + sigma * z.reshape(x.shape)
    if x0 is not None:
        new = new + to_previous * upcast(x0)
        x0.copy_(predicted)
    x.copy_(new)


def discrepancy_maps(recon_a: Tensor, recon_b: Tensor) -> tuple[Tensor, Tensor]:
    """X = mean_C |mu_B - mu_A| and Y = sqrt(mean_{K,C} (recon_A - mu_A)^2), each (Z, 1, H, W)."""
    a, b = upcast(recon_a), upcast(recon_b)
    mu_a, mu_b = a.mean(0), b.mean(0)
    inter = (mu_b - mu_a).abs().mean(1, keepdim=True)
    intra = (a - mu_a).square().mean(0).mean(1, keepdim=True).sqrt()
    return inter.contiguous(), intra.contiguous()


def gaussian_kl(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str = "sum"
) -> Tensor:
    """KL(q || p) of diagonal Gaussians, elementwise, summed or averaged over the elements."""
    mu_q, logvar_q, mu_p, logvar_p = map(upcast, (mu_q, logvar_q, mu_p, logvar_p))
    ratio = torch.exp(logvar_q - logvar_p)
    kl = 0.5 * (logvar_p - logvar_q + ratio + (mu_q - mu_p).square() * torch.exp(-logvar_p) - 1.0)
    if reduction == "none":
        return kl.contiguous()
    return kl.mean() if reduction == "mean" else kl.sum()


def gaussian_kl_backward(
    grad: Tensor, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gaussian_kl` for its four tensors, each in its own type."""
    inputs = (mu_q, logvar_q, mu_p, logvar_p)
    mu_q, logvar_q, mu_p, logvar_p = map(upcast, inputs)
    scale = grad / mu_q.numel() if reduction == "mean" else grad
    precision, ratio = torch.exp(-logvar_p), torch.exp(logvar_q - logvar_p)
    difference = mu_q - mu_p
    d_mu = scale * difference * precision
    d_logvar_q = scale * 0.5 * (ratio - 1.0)
    d_logvar_p = scale * 0.5 * (1.0 - ratio - difference.square() * precision)
    grads = (d_mu, d_logvar_q, -d_mu, d_logvar_p)
    a, b, c, d = (g.to(i.dtype).contiguous() for g, i in zip(grads, inputs, strict=True))
    return a, b, c, d


def _centroids(z: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(num_groups, dtype=z.dtype, device=z.device)
    counts.index_add_(0, group, torch.ones_like(group, dtype=z.dtype))
    sums = torch.zeros(num_groups, z.shape[1], dtype=z.dtype, device=z.device).index_add_(0, group, z)
    return counts, sums / counts.clamp(min=1)[:, None]


def pairwise_sqdist(z: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum over groups of ||z_i - z_j||^2 over unordered pairs = sum_g n_g sum_i ||z_i - mean_g||^2."""
    codes = upcast(z)
    counts, centres = _centroids(codes, group, num_groups)
    return (counts[group] * (codes - centres[group]).square().sum(1)).sum()


def pairwise_sqdist_backward(grad: Tensor, z: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """d/dz_i = 2 n_g (z_i - mean_g)."""
    codes = upcast(z)
    counts, centres = _centroids(codes, group, num_groups)
    return (grad * 2.0 * counts[group][:, None] * (codes - centres[group])).to(z.dtype).contiguous()


def ensemble_variance(samples: Tensor, correction: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and variance over dimension 0, dividing by S - correction."""
    values = upcast(samples)
    mean = values.mean(0)
    variance = (values - mean).square().sum(0) / (len(samples) - correction)
    return mean.contiguous(), variance.contiguous()


def ensemble_merge(
    mean: Tensor, m2: Tensor, count: int, other_mean: Tensor, other_m2: Tensor, other_count: int
) -> None:
    """Merge a second (mean, M2, count) into the first in place (Chan, Golub, LeVeque 1979)."""
    if other_count == 0:
        return
    total = count + other_count
    delta = other_mean - mean
    mean.add_(delta * (other_count / total))
    m2.add_(other_m2 + delta.square() * (count * other_count / total))


def ensemble_update(mean: Tensor, m2: Tensor, count: int, samples: Tensor) -> None:
    """Merge new samples (S, ...) into the running mean and sum of squared deviations M2 in place."""
    if len(samples) == 0:
        return
    values = upcast(samples)
    other = values.mean(0)
    ensemble_merge(mean, m2, count, other, (values - other).square().sum(0), len(samples))


def norm_layout(x: Tensor) -> torch.memory_format:
    """The memory format of group_norm_silu's result: channels last where x is and is not contiguous too."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


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
    """silu(group_norm(x) (1 + scale) + shift) + residual; and each group's mean and 1 / std."""
    values = upcast(x)
    layout = norm_layout(x)
    if x.numel() == 0:
        mean, rstd = (values.new_zeros(x.shape[0], num_groups) for _ in range(2))
        return torch.empty_like(x, memory_format=layout), mean, rstd
    grouped = values.reshape(x.shape[0], num_groups, -1)
    mean = grouped.mean(2)
    rstd = torch.rsqrt((grouped - mean[..., None]).square().mean(2) + eps)
    y = _modulated(values, mean, rstd, num_groups, weight, bias, scale, shift)
    y = y * torch.sigmoid(y)
    if residual is not None:
        y = y + upcast(residual)
    return y.to(x.dtype).contiguous(memory_format=layout), mean, rstd


def _modulated(
    values: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    per_channel = values.shape[1] // max(num_groups, 1)
    shape = (-1, values.shape[1], *[1] * (values.ndim - 2))
    mean = mean.repeat_interleave(per_channel, 1).reshape(shape)
    rstd = rstd.repeat_interleave(per_channel, 1).reshape(shape)
    y = (values - mean) * rstd * upcast(weight).reshape(shape) + upcast(bias).reshape(shape)
    if scale is not None:
        y = y * (1.0 + upcast(scale).reshape(shape))
    if shift is not None:
        y = y + upcast(shift).reshape(shape)
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
    """Gradients for x (its type) and, in the accumulation type, weight, bias (C,), scale, shift (N, C).

    With h = normalised x, y = (h weight + bias)(1 + scale) + shift and g = d silu(y):
    d h = g (1 + scale) weight; d x = rstd (d h - mean(d h) - h mean(d h h)) over each group.
    """
    values, g = upcast(x), upcast(grad)
    n, channels = x.shape[:2]
    layout = norm_layout(x)
    if x.numel() == 0:
        d_weight, d_bias = values.new_zeros(channels), values.new_zeros(channels)
        d_scale, d_shift = values.new_zeros(n, channels), values.new_zeros(n, channels)
        return torch.empty_like(x, memory_format=layout), d_weight, d_bias, d_scale, d_shift
    y = _modulated(values, mean, rstd, num_groups, weight, bias, scale, shift)
    sigmoid = torch.sigmoid(y)
    g = g * sigmoid * (1.0 + y * (1.0 - sigmoid))
    h = (values.reshape(n, num_groups, -1) - mean[..., None]) * rstd[..., None]
    g, h = g.reshape(n, channels, -1), h.reshape(n, channels, -1)
    d_shift, g_h = g.sum(2), (g * h).sum(2)  # (N, C)
    w, b = upcast(weight), upcast(bias)
    gain = 1.0 + upcast(scale) if scale is not None else torch.ones_like(d_shift)
    d_scale = g_h * w + d_shift * b
    d_weight, d_bias = (g_h * gain).sum(0), (d_shift * gain).sum(0)
    d_h = (g * (gain * w)[..., None]).reshape(n, num_groups, -1)
    grouped_h = h.reshape(n, num_groups, -1)
    d_x = rstd[..., None] * (
        d_h - d_h.mean(2, keepdim=True) - grouped_h * (d_h * grouped_h).mean(2, keepdim=True)
    )
    d_x = d_x.reshape(x.shape).to(x.dtype).contiguous(memory_format=layout)
    return d_x, d_weight, d_bias, d_scale, d_shift

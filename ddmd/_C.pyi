"""Types of the C++ and CUDA core. Addresses are integers, sizes and strides count elements."""

from collections.abc import Sequence
from typing import Any

interface: int

def build_info() -> dict[str, Any]: ...
def use_openmp(gomp_parallel: int) -> None: ...
def philox(counters: int, seed: int, words: int, count: int) -> None: ...
def ensemble_variance(
    x: int, type: int, samples: int, stride: int, shape: Sequence[int], strides: Sequence[int],
    correction: int, mean: int, variance: int, threads: int,
) -> None: ...  # fmt: skip
def ensemble_update(
    mean: int, m2: int, count: int, x: int, type: int, samples: int, stride: int, shape: Sequence[int],
    strides: Sequence[int], threads: int,
) -> None: ...  # fmt: skip
def ensemble_merge(
    mean: int, m2: int, count: int, other_mean: int, other_m2: int, other_count: int, size: int, threads: int,
) -> None: ...  # fmt: skip
def denoise_step(
    x: int, type: int, output: int, output_type: int, x0: int, table: int, step: int, seed: int, sample: int,
    slice: int, rows: int, row_size: int, threads: int,
) -> None: ...  # fmt: skip
def noise(
    x0: int, x: int, type: int, t: int, table: int, step: int, seed: int, sample: int, slice: int, rows: int,
    row_size: int, threads: int,
) -> None: ...  # fmt: skip
def pure_noise(
    x: int, type: int, step: int, seed: int, sample: int, slice: int, rows: int, row_size: int, threads: int,
) -> None: ...  # fmt: skip
def discrepancy_maps(
    a: int, b: int, type: int, members_a: int, members_b: int, slices: int, channels: int, pixels: int,
    inter: int, intra: int, threads: int,
) -> None: ...  # fmt: skip
def group_norm_silu(
    x: int, type: int, channels_last: bool, batch: int, channels: int, pixels: int, groups: int, weight: int,
    bias: int, scale: int, shift: int, residual: int, eps: float, y: int, mean: int, rstd: int, threads: int,
) -> None: ...  # fmt: skip
def group_norm_silu_backward(
    grad: int, x: int, type: int, channels_last: bool, batch: int, channels: int, pixels: int, groups: int,
    weight: int, bias: int, scale: int, shift: int, mean: int, rstd: int, d_x: int, d_weight: int, d_bias: int,
    d_scale: int, d_shift: int, threads: int,
) -> None: ...  # fmt: skip

# Only where it was built with CUDA
def cuda_ensemble(
    x: int, type: int, samples: int, stride: int, shape: Sequence[int], strides: Sequence[int], size: int,
    correction: int, mean: int, variance: int, count: int, running: bool, stream: int,
) -> None: ...  # fmt: skip
def cuda_merge(
    mean: int, m2: int, count: int, other_mean: int, other_m2: int, other_count: int, size: int, stream: int,
) -> None: ...  # fmt: skip

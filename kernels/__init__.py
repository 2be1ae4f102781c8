"""Triton kernels for CUDA, one op family a file; launchers with the names and arguments of `ddmd.ops.reference`.

With TRITON_INTERPRET=1 set before the import they run on CPU tensors, one element at a time: for tests.
"""

from ddmd.kernels.denoise import denoise_step, noise, philox, pure_noise
from ddmd.kernels.discrepancy import discrepancy_maps
from ddmd.kernels.group_norm import group_norm_silu
from ddmd.kernels.group_norm_backward import group_norm_silu_backward
from ddmd.kernels.kl_divergence import gaussian_kl, gaussian_kl_backward
from ddmd.kernels.pairwise_distance import pairwise_sqdist, pairwise_sqdist_backward

__all__ = [
    "denoise_step", "discrepancy_maps", "gaussian_kl", "gaussian_kl_backward", "group_norm_silu",
    "group_norm_silu_backward", "noise", "pairwise_sqdist", "pairwise_sqdist_backward", "philox",
    "pure_noise", "why_not",
]  # fmt: skip


def why_not() -> str | None:
    """Why the kernels do not serve CUDA tensors, or None where they do.

    Where there is a GPU, this builds what Triton builds at its first launch.
    """
    import torch
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"Triton {triton.__version__} is older than 3.6"
    if not torch.cuda.is_available():
        return None
    from ddmd.kernels.launch import why_no_launcher

    return why_no_launcher()

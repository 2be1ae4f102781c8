"""One table of tolerances and shapes for every test of an op."""

import torch

# largest |difference| / (1 + |reference|), by the type that values are stored in
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TYPES = tuple(TOLERANCE)


def assert_close(ours: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Compare with a reference; says the largest error. NaN is never close."""
    assert ours.shape == reference.shape, f"shape {tuple(ours.shape)}, wanted {tuple(reference.shape)}"
    if ours.numel() == 0:
        return
    error = ((ours.double() - reference.double()).abs() / (1 + reference.double().abs())).max().item()
    assert error <= TOLERANCE[dtype], f"off by {error:.2e}, tolerance {TOLERANCE[dtype]:.0e} for {dtype}"


def rows(count: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """step, seed, sample, slice_index for `count` rows, at random."""
    return (
        torch.tensor(1, device=device),
        torch.randint(-(2**62), 2**62, (), device=device),
        torch.randint(0, 50, (count,), device=device),
        torch.randint(0, 300, (count,), device=device),
    )

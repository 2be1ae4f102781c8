"""The smooth drift of intensity that coils leave in an image: estimated, judged by its evidence, divided out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.polynomial import legendre
from scipy import ndimage

BIAS_CHOICES = ("auto", "off", "on", "n4")
DEGREE = 3  # of the polynomial, all axes together
SAMPLES = 150_000  # voxels the field is estimated from
BLOCK_MM = 14.0  # edge of the blocks whose commonest intensity is taken
MIN_BLOCK_SHARE = 0.3  # of a full block's voxels: blocks with fewer are left out
LOG_RANGE, BINS, BIN_SMOOTHING = 1.2, 120, 3.0  # of the histograms of log intensity
BIN_SPREAD = (
    2 * LOG_RANGE / BINS / 12**0.5
)  # standard deviation of what a mode loses as the middle of its bin
ROUNDS = 15  # of reweighted least squares
OUTLIER = 1.5  # robust standard deviations at which a block has a quarter of the weight
RIDGE = 1e-5
EVIDENCE = (
    2.2  # field over residual: real volumes without a field reach 1.8, those with a clear one exceed this
)
ADDITIVE_SCALE = 0.2  # typical spread of log intensity in a brain, one robust standard deviation


@dataclass(frozen=True)
class BiasField:
    """A smooth field of a volume and what speaks for it.

    log_field : (X, Y, Z) float32, 0 on average over the blocks; the image is to be divided by its exponential.
    evidence : standard deviation of the field over that of what it leaves unexplained, at least BIN_SPREAD.
    peak_to_peak : of the field within the brain's blocks, natural logarithm.
    additive : whether the intensities have no meaningful zero, so that the field is to be subtracted.
    """

    log_field: np.ndarray
    evidence: float
    peak_to_peak: float
    additive: bool

    @property
    def clear(self) -> bool:
        """Whether the evidence is enough to correct it."""
        return self.evidence > EVIDENCE


def estimate_bias_field(
    values: np.ndarray, brain: np.ndarray, spacing: np.ndarray | tuple[float, ...], background: float
) -> BiasField | None:
    """Fit a polynomial to the commonest log intensity of small blocks of brain.

    The mode of a block is that of its commonest tissue, so partial volume, fluid and small lesions do not move
    it; blocks within a large lesion are outliers, which iteratively reweighted least squares leaves out
    (Tukey-like weights, normal equations). None where the brain is too small.

    Parameters
    ----------
    values : (X, Y, Z) float
    brain : (X, Y, Z) bool
    spacing : (3,) mm
    background : float
        What zero signal is. Where tissue lies on both sides of it, the field is taken as additive.
    """
    inside = np.flatnonzero(brain)
    inside = inside[:: max(1, len(inside) // SAMPLES)]
    position = np.stack(np.unravel_index(inside, brain.shape), 1)
    low, high = _extent(brain)
    signal = values.ravel()[inside].astype(np.float64) - background
    log_signal, additive = _log_signal(signal)
    cell = ((position - low) * np.asarray(spacing) / BLOCK_MM).astype(np.int64)
    block = np.ravel_multi_index(tuple(cell.T), tuple(cell.max(0) + 1))
    count = int(block.max()) + 1
    bins = ((log_signal + LOG_RANGE) * (BINS / (2 * LOG_RANGE))).clip(0, BINS - 1).astype(np.int64)
    histogram = (
        np.bincount(block * BINS + bins, minlength=count * BINS).reshape(count, BINS).astype(np.float64)
    )
    voxels = histogram.sum(1)
    used = voxels > MIN_BLOCK_SHARE * np.percentile(voxels[voxels > 0], 90)
    orders = np.indices((DEGREE + 1,) * 3).sum(0) <= DEGREE
    if used.sum() < 3 * orders.sum() or not np.ptp(log_signal) > 0:
        return None
    histogram[:, [0, -1]] = 0  # what lies beyond the range
    smooth = ndimage.gaussian_filter1d(histogram, BIN_SMOOTHING, axis=1)
    mode = (smooth.argmax(1) + 0.5) * (2 * LOG_RANGE / BINS) - LOG_RANGE
    centre = (
        np.stack([np.bincount(block, axis, count) for axis in position.T], 1) / np.maximum(voxels, 1)[:, None]
    )
    u, v, w = (2 * (centre - low) / np.maximum(high - low, 1) - 1).T
    terms = legendre.legvander3d(u, v, w, [DEGREE] * 3)[:, orders.ravel()][used]
    solution, spread = _robust_fit(terms, mode[used])
    solution[0] = 0.0  # the level is no field
    fitted = terms @ solution
    coefficients = np.zeros(orders.shape)
    coefficients[orders] = solution
    return BiasField(
        _polynomial(coefficients, brain.shape, low, high),
        float(fitted.std() / spread),
        float(np.ptp(fitted)),
        additive,
    )


def correct_bias(
    values: np.ndarray,
    brain: np.ndarray,
    spacing: np.ndarray | tuple[float, ...],
    background: float,
    method: str = "auto",
) -> tuple[np.ndarray, BiasField | None]:
    """A volume without its bias field, and the field where one was taken away.

    Parameters
    ----------
    values : (X, Y, Z) float32
    brain : (X, Y, Z) bool
    spacing : (3,) mm
    background : float
    method : "auto", "off", "on" or "n4"
        auto corrects only a field with clear evidence, and returns `values` itself otherwise; on always
        corrects; n4 corrects by N4 (Tustison et al. 2010, doi:10.1109/TMI.2010.2046908) of SimpleITK.

    Raises
    ------
    ValueError
        If there is no such method.
    ImportError
        If n4 is asked for and SimpleITK is missing.
    """
    if method not in BIAS_CHOICES:
        raise ValueError(f"bias is {method!r}; allowed are {', '.join(BIAS_CHOICES)}")
    if method == "off":
        return values, None
    if method == "n4":
        return _n4(values, brain, spacing, background), None
    field = estimate_bias_field(values, brain, spacing, background)
    if field is None or (method == "auto" and not field.clear):
        return values, None
    if field.additive:
        scale = _spread(values[brain]) / ADDITIVE_SCALE
        return (values - np.float32(scale) * field.log_field).astype(np.float32, copy=False), field
    zero = np.float32(background)
    return ((values - zero) * np.exp(-field.log_field) + zero).astype(np.float32, copy=False), field


def _log_signal(signal: np.ndarray) -> tuple[np.ndarray, bool]:
    """Logarithm of signal over its median; or a robust z-score of like spread, and True, where zero is arbitrary."""
    middle = float(np.median(signal))
    if middle != 0 and np.mean(signal / middle <= 0) < 0.05 and _spread(signal) < abs(middle):
        return np.log(np.maximum(signal / middle, 1e-3)), False
    return (signal - middle) * (ADDITIVE_SCALE / (_spread(signal) or 1.0)), True


def _spread(values: np.ndarray) -> float:
    """Interquartile range of a normal distribution's standard deviation: (Q3 - Q1) / 1.349."""
    low, high = np.percentile(values, (25, 75))
    return float(high - low) / 1.349


def _robust_fit(terms: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients and the robust standard deviation of what they leave, by reweighted normal equations."""
    ridge = RIDGE * len(values) * np.eye(terms.shape[1])
    weight, spread = np.ones(len(values)), 1.0
    solution = np.zeros(terms.shape[1])
    for _ in range(ROUNDS):
        weighted = terms * weight[:, None]
        solution = np.linalg.solve(weighted.T @ terms + ridge, weighted.T @ values)
        rest = values - terms @ solution
        spread = max(1.4826 * float(np.median(np.abs(rest))), BIN_SPREAD)
        weight = (1 + (rest / (OUTLIER * spread)) ** 2) ** -4.0
    return solution, spread


def _extent(brain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last voxel of the brain along each axis."""
    inside = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return np.array([i[0] for i in inside]), np.array([i[-1] for i in inside])


def _polynomial(
    coefficients: np.ndarray, shape: tuple[int, ...], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The Legendre series over the grid (X, Y, Z) float32; outside the box it goes on as at its edge."""
    along = [
        legendre.legvander(np.clip(2.0 * (np.arange(n) - a) / max(b - a, 1) - 1.0, -1.0, 1.0), DEGREE)
        for n, a, b in zip(shape, low, high, strict=True)
    ]
    field: np.ndarray = np.einsum(
        "xi,yj,zk,ijk->xyz",
        *(axis.astype(np.float32) for axis in along),
        coefficients.astype(np.float32),
        optimize=True,
    )
    return field


def _n4(
    values: np.ndarray, brain: np.ndarray, spacing: np.ndarray | tuple[float, ...], background: float
) -> np.ndarray:
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise ImportError(f"bias='n4' needs SimpleITK ({error}); pip install 'ddmd[n4]'") from None
    sign = 1.0 if float(np.median(values[brain])) >= background else -1.0
    signal = np.maximum(sign * (values.astype(np.float32) - np.float32(background)), 0)
    image, mask = sitk.GetImageFromArray(signal), sitk.GetImageFromArray(brain.astype(np.uint8))
    for part in (image, mask):
        part.SetSpacing([float(s) for s in reversed(tuple(spacing))])
    shrink = [max(1, round(4.0 / s)) for s in reversed(tuple(spacing))]
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.Execute(sitk.Shrink(image, shrink), sitk.Shrink(mask, shrink))
    log_field: np.ndarray = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image))
    zero = np.float32(background)
    corrected: np.ndarray = ((values - zero) * np.exp(-log_field) + zero).astype(np.float32)
    return corrected

"""The brain within a head with its skull on, by opening and by the overlap from slice to slice."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

TISSUE = (-1.0, 1.8)  # half robust z-scores: brain and most lesions; neither bone and air nor fat
OPENED_MM = 5.0  # bridges to the scalp and the orbits are thinner than twice this
CLOSED_MM = 8.0  # sulci and fissures are narrower than twice this
SHARED = 0.6  # of a body that lies on the brain of the next slice: then it is brain, too
SPREAD_MM = 8.0  # by which the brain of a slice may stand out over that of the next
WORKING_MM, WORKING_SLICE_MM = 1.75, 3.0  # of the grid that a head is looked at on, where its own is finer
CORE_MM = 25.0  # this deep inside the head most is brain
ROUNDS = 2  # of extraction; the first brain gives the z-scores of the second
BRIGHT_MM = 7.0  # inside the head's outline: very bright tissue this deep may be a lesion
MARGIN_MM = 3.0  # kept round the brain: lesions reach its surface
BAY_MM = 15.0  # bays of the brain's outline narrower than twice this are brain
BESIDE = 0.5  # of the surroundings of a bright body that is brain: then it is a lesion in it
SMALLEST = 0.1  # of the head: a smaller brain is none


def extract_brain(values: np.ndarray, spacing: np.ndarray) -> np.ndarray | None:
    """The brain of a head whose air is dark, or None where none is found.

    Parameters
    ----------
    values : (X, Y, Z) float, canonical order
    spacing : (3,) mm

    Returns
    -------
    (X, Y, Z) bool
    """
    mm = max(float(min(spacing[:2])), WORKING_MM)
    working = np.array([mm, mm, max(float(spacing[2]), WORKING_SLICE_MM)])
    at = [
        np.minimum(((np.arange(max(1, round(n * old / new))) + 0.5) * new / old).astype(int), n - 1)
        for n, old, new in zip(values.shape, spacing, working, strict=True)
    ]
    planes = np.ascontiguousarray(values[np.ix_(*at)].transpose(2, 1, 0), dtype=np.float32)
    tissue, head = _tissue_and_head(planes)
    depth = np.stack([_depth(plane) * mm for plane in head])
    inside = tissue & (depth > CORE_MM)
    brain = np.zeros_like(head)
    for _ in range(ROUNDS):
        if not inside.any():
            return None
        z_scores = _z_scores(planes, inside)
        brain = brain_within(0.5 * z_scores, head, mm)
        inside = brain
    if brain.sum() <= SMALLEST * head.sum():
        return None
    bright = head & ~brain & (0.5 * z_scores >= TISSUE[1]) & (depth > BRIGHT_MM)
    brain = _with_lesions(brain, bright, mm)
    for z in np.flatnonzero(brain.any(axis=(1, 2))):  # a lesion at the surface leaves a bay
        brain[z] |= _closed(brain[z], mm, MARGIN_MM, BAY_MM) & (depth[z] > BRIGHT_MM)
    scale = spacing / working
    whole = ndimage.affine_transform(
        brain.transpose(2, 1, 0).astype(np.float32),
        scale,
        0.5 * scale - 0.5,
        values.shape,
        order=1,
        mode="nearest",
    )
    found: np.ndarray = whole > 0.5
    return found if found.any() else None


def head_outline(values: np.ndarray) -> np.ndarray:
    """The head (X, Y, Z) bool whose air is dark, its air-filled spaces included slice by slice."""
    return _tissue_and_head(values.transpose(2, 1, 0))[1].transpose(2, 1, 0)


def _tissue_and_head(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is brighter than half of Otsu's threshold between air and tissue, and its largest body filled."""
    low, high = np.percentile(planes, (1, 99))
    if not high > low:
        low, high = float(planes.min()), float(planes.max())
    scaled = np.clip((planes - low) / max(high - low, np.finfo(np.float32).tiny), 0.0, 1.0)
    counts, edges = np.histogram(scaled, 128, (0.0, 1.0))  # of shares: any intensities have finite bins
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    mean_below = np.cumsum(counts * centres) / np.maximum(below, 1)
    total = float((counts * centres).sum())
    above = below[-1] - below
    mean_above = (total - np.cumsum(counts * centres)) / np.maximum(above, 1)
    otsu = centres[(below * above * (mean_below - mean_above) ** 2).argmax()]
    tissue = scaled > 0.5 * otsu
    return tissue, filled_slices(largest_body(ndimage.binary_opening(tissue)).transpose(2, 1, 0)).transpose(
        2, 1, 0
    )


def largest_body(mask: np.ndarray) -> np.ndarray:
    """The largest body (6 neighbours) of a mask."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts[mask])
    body: np.ndarray = parts == sizes.argmax()
    return body


def filled_slices(mask: np.ndarray) -> np.ndarray:
    """The mask (X, Y, Z) with the holes of each axial slice filled."""
    filled = mask.copy()
    for z in np.flatnonzero(mask.any(axis=(0, 1))):
        filled[:, :, z] = _filled(mask[:, :, z])
    return filled


def _filled(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) with its holes filled, as `scipy.ndimage.binary_fill_holes` does it, which is slower."""
    parts, count = ndimage.label(~mask)
    outside = np.zeros(count + 1, bool)
    for edge in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        outside[edge] = True
    outside[0] = False
    filled: np.ndarray = ~outside[parts]
    return filled


def _depth(plane: np.ndarray) -> np.ndarray:
    """Distance in pixels to the outside, what is beyond the plane included."""
    return np.asarray(ndimage.distance_transform_edt(np.pad(plane, 1)))[1:-1, 1:-1]


def _z_scores(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Robust z-scores; the spread is that of the darker half where fluid is bright."""
    low, middle, high = np.percentile(values[inside], (25, 50, 75))
    spread = min(high - low, 2 * (middle - low)) / 1.349 or float(values[inside].std()) or 1.0
    return np.asarray((values - np.float32(middle)) / np.float32(spread))


def _with_lesions(brain: np.ndarray, bright: np.ndarray, mm: float) -> np.ndarray:
    """The brain (Z, H, W) with the bright regions that it mostly surrounds, closed."""
    added = brain.copy()
    for z in np.flatnonzero(brain.any(axis=(1, 2)) & bright.any(axis=(1, 2))):
        parts, _ = ndimage.label(ndimage.binary_opening(bright[z]))
        for k, box in enumerate(ndimage.find_objects(parts), 1):
            wide = tuple(slice(max(s.start - 3, 0), s.stop + 3) for s in box)
            body = parts[wide] == k
            ring = ndimage.binary_dilation(body, iterations=2) & ~ndimage.binary_dilation(body)
            if brain[z][wide][ring].mean() > BESIDE:
                added[z][wide] |= ndimage.binary_dilation(body)
        if (added[z] != brain[z]).any():
            added[z] = _closed(added[z], mm, grown_mm=0.0)
    return added


def brain_within(image: np.ndarray, head: np.ndarray, mm: float) -> np.ndarray:
    """Where the brain is, slice by slice away from the one that shows most of it.

    Opening parts the brain from what is around the skull; the largest body is the brain, and so is, slice after
    slice, what lies on it. Bright lesions are filled unless they reach the surface. As rough as that is, muscle
    just below the cerebellum may be taken for brain. Of a skull-stripped volume nearly all is found.

    Parameters
    ----------
    image : (Z, H, W) float32, half robust z-scores
    head : (Z, H, W) bool, what is not air
    mm : float, millimetres a pixel

    Returns
    -------
    (Z, H, W) bool
    """
    tissue = head & (image > TISSUE[0]) & (image < TISSUE[1])
    brain = np.zeros_like(head)
    parts, sizes = [], []
    for plane in tissue:
        labels, count = ndimage.label(ndimage.distance_transform_edt(plane) > OPENED_MM / mm)
        parts.append(labels)
        sizes.append(np.bincount(labels.ravel(), minlength=count + 1))
        sizes[-1][0] = 0  # what is no body
    widest = int(np.argmax([size.max() for size in sizes]))
    if not sizes[widest].any():
        return brain
    brain[widest] = _closed(parts[widest] == sizes[widest].argmax(), mm) & head[widest]
    for way in (1, -1):
        for z in range(widest + way, len(head) if way > 0 else -1, way):
            before = brain[z - way]
            shared = np.bincount(parts[z][before], minlength=len(sizes[z]))
            kept = (sizes[z] > 0) & (shared > SHARED * sizes[z])
            if not kept.any():
                break
            near = ndimage.distance_transform_edt(~before) <= SPREAD_MM / mm
            brain[z] = _closed(kept[parts[z]], mm) & near & head[z]
    return brain


def _closed(
    core: np.ndarray, mm: float, grown_mm: float = OPENED_MM, closed_mm: float = CLOSED_MM
) -> np.ndarray:
    """The regions (H, W) dilated by this much, which restores the edge that opening removed, closed and filled."""
    margin = int(np.ceil((grown_mm + closed_mm) / mm)) + 2
    away = ndimage.distance_transform_edt(~np.pad(core, margin))
    wide = ndimage.distance_transform_edt(away <= (grown_mm + closed_mm) / mm) > closed_mm / mm
    return _filled(wide[margin:-margin, margin:-margin])

"""Results with a known lesion, for the tests of `ddmd report`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform

from ddmd.data.phantom import Lesion as PaintedLesion
from ddmd.data.phantom import Phantom, phantom
from ddmd.inference.detection import Detection
from ddmd.inference.postprocess import Lesion

SPACING = 3.0
CENTRE = (-30.0, -48.0, 27.0)  # mm: left, behind, above; no mirror image of itself
NASTY = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>&amp;"


def detection(name: str, image, mask, **changes) -> Detection:
    """A detection whose mask is the given one."""
    values = np.asarray(mask.dataobj).astype(np.float32)
    middle = np.argwhere(values > 0).mean(axis=0) if values.any() else np.zeros(3)
    centre = tuple(float(v) for v in nib.affines.apply_affine(mask.affine, middle))
    ml = float(values.sum() * abs(np.linalg.det(mask.affine[:3, :3])) / 1000)

    def like(array) -> nib.Nifti1Image:
        return nib.Nifti1Image(array, mask.affine)

    settings = {
        "score": 0.75,
        "lesions": (Lesion(ml, centre, 0.9, 0.8, 0.05),),
        "notes": (),
        "provenance": {
            "Weights": "tiny",
            "Threshold": 0.5,
            "Sources": {"flair": f"{name}_flair.nii.gz"},
            "BrainMl": 1500.0,
            "Quality": {"UncertainShare": 0.1, "Flags": ["skull"]},
        },
    } | changes
    return Detection(
        mask=like(values.astype(np.uint8)),
        probability=like(values * np.float32(0.9)),
        uncertainty=like(values * np.float32(0.05)),
        inter_discrepancy=like(values),
        intra_discrepancy=like(values),
        image=image,
        name=name,
        labels=like(values.astype(np.uint8)),
        **settings,
    )


def reoriented(image, codes: str) -> nib.Nifti1Image:
    return image.as_reoriented(ornt_transform(nib.io_orientation(image.affine), axcodes2ornt(tuple(codes))))


@cache
def brain() -> Phantom:
    """A phantom with one lesion on the left."""
    pytest.importorskip("nilearn", reason="the phantom needs nilearn")
    return phantom(seed=3, spacing_mm=SPACING, lesions=[PaintedLesion(CENTRE, 14.0)], sequences=("flair",))


def write_cohort(folder: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    """Folders of images and of results: one case, stored in a random orientation."""
    pairs = [("L", "R"), ("P", "A"), ("I", "S")]
    codes = "".join(pairs[axis][rng.integers(2)] for axis in rng.permutation(3))
    print("orientation", codes)
    image, mask = reoriented(brain().images["flair"], codes), reoriented(brain().lesion, codes)
    inputs, out = folder / "in", folder / "out"
    inputs.mkdir()
    nib.save(image, inputs / "p-1_flair.nii.gz")
    detection("p-1", image, mask).save(out, overlay=True)
    return inputs, out

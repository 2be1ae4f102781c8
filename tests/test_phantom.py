"""The made-up brain: exact mask, contrast of each sequence, decided by its seed."""

import nibabel as nib
import numpy as np
import pytest

from ddmd.data.phantom import Lesion, phantom, write

pytest.importorskip("nilearn", reason="the extra ddmd[phantom] is not installed")


def test_the_phantom_keeps_its_promises(tmp_path):
    lesion = Lesion((-25.0, -20.0, 25.0), 12.0)
    made = phantom(seed=5, spacing_mm=4.0, lesions=[lesion])
    again, other = phantom(seed=5, spacing_mm=4.0, lesions=[lesion]), phantom(seed=6, spacing_mm=4.0, lesions=[lesion])
    data = {s: np.asanyarray(i.dataobj) for s, i in made.images.items()}
    assert all(np.array_equal(data[s], np.asanyarray(again.images[s].dataobj)) for s in data)
    assert not np.array_equal(data["flair"], np.asanyarray(other.images["flair"].dataobj))
    mask, brain = np.asanyarray(made.lesion.dataobj) > 0, np.asanyarray(made.brain.dataobj) > 0
    assert (mask & ~brain).sum() == 0
    ml = mask.sum() * 0.064
    assert 0.5 < ml / (4 / 3 * np.pi * 1.2**3) < 1.6
    centre = made.lesion.affine[:3, :3] @ np.argwhere(mask).mean(0) + made.lesion.affine[:3, 3]
    assert np.abs(centre - lesion.centre_mm).max() < 6
    deep = brain & ~mask
    for sequence, sign in (("flair", 1), ("t2", 1), ("t1", -1)):
        assert sign * (np.median(data[sequence][mask]) - np.median(data[sequence][deep])) > 0, sequence
    healthy = phantom(seed=5, spacing_mm=4.0, lesions=0)
    assert not np.asanyarray(healthy.lesion.dataobj).any()
    with pytest.raises(ValueError, match="sequences holds pd; allowed are"):
        phantom(sequences=("pd",))
    with pytest.raises(ValueError, match="spacing_mm is 0.1"):
        phantom(spacing_mm=0.1)
    paths = write(made, tmp_path, "p")
    assert np.array_equal(np.asanyarray(nib.load(paths["flair"]).dataobj), data["flair"])

"""The shipped weights on a fixed phantom: what they find, at both precisions, and how far it depends on the batch."""

import numpy as np
import pytest

from ddmd.inference.detector import Detector

# Volume (ml) and centre (mm, RAS) of what is found in phantom 0 at 3 mm; stored when the weights were shipped.
STORED = ((9.15, (37.3, -7.8, 30.2)), (4.75, (-22.8, 45.2, 7.9)), (0.46, (-39.5, -42.1, 28.0)))
BATCH_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}  # of probability, as `Detector.detect` promises


def _phantom():
    pytest.importorskip("nilearn", reason="nilearn (ddmd[phantom]) is not installed")
    from ddmd.data.phantom import phantom

    return phantom(seed=0, spacing_mm=3.0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_lesions_of_a_phantom_are_found(precision):
    made = _phantom()
    detector = Detector.load("flair-image-labels", "cpu", precision)
    detection = detector.detect({"flair": made.images["flair"]})
    mask, truth = (np.asarray(image.dataobj) > 0 for image in (detection.mask, made.lesion))
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9
    assert len(detection.lesions) == len(STORED)
    for lesion, (volume_ml, centre) in zip(detection.lesions, STORED, strict=True):
        assert lesion.volume_ml == pytest.approx(volume_ml, rel=0.1, abs=0.1)
        assert lesion.centre_mm == pytest.approx(centre, abs=1.5)
        assert lesion.peak_probability > 0.95
    assert detection.score > 0.9
    assert detection.provenance["Precision"] == precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_batch_changes_no_more_than_is_promised(precision):
    detector = Detector.load("flair-image-labels", "cpu", precision)
    prepared = detector.prepare({"flair": _phantom().images["flair"]})
    one, *others = (
        detector.to_volume(
            prepared, detector.maps(prepared, detector.sampling_config(samples=2, batch=batch))
        )
        for batch in (8, 1, 32)
    )
    for other in others:
        for name, values in vars(one).items():
            gap = np.abs(values - getattr(other, name)).max()
            assert gap < BATCH_TOLERANCE[precision], f"{name} differs by {gap:.1e}"

"""Train a system on your own data from image-level labels, then detect with it: `python examples/train_on_own_data.py [OUT]`.

Phantoms stand for your data, and everything is tiny: it takes seconds and shows the steps, not quality. It needs the
extras `train` and `phantom`. docs/training.md explains each step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ddmd
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.tables import label_slices
from ddmd.data.phantom import phantom, write
from ddmd.models.autoencoder import AutoencoderConfig
from ddmd.models.denoiser import DenoiserConfig
from ddmd.training import train
from ddmd.training.config import AutoencoderStage, DataEntry, DenoiserStage, TrainConfig

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/own-training")

# 1. The data: one folder a patient. Yours has real scans; the last of these four patients is healthy.
for number in range(4):
    made = phantom(seed=number, spacing_mm=4.0, lesions=0 if number == 3 else 3, sequences=("flair",))
    write(made, out / "data", f"patient-{number}", style="brats")

# 2. Image-level labels: which slices hold a lesion. Here they are read off the masks, once. Training sees this table,
#    in which no mask is named. Write such a table by hand if you have no masks.
cases = find_cases(out / "data")
label_slices(cases, out / "labelled", healthy=["patient-3"])

# 3. The configuration. `ddmd train my.toml` reads the same entries from a TOML file.
config = TrainConfig(
    name="mine",
    labels="image",
    data=(DataEntry(str(out / "labelled"), layout="table"),),
    validation=0.0,
    test=0.25,
    mm=4.0,
    size=64,
    autoencoder=AutoencoderConfig(members=2, width=4, code=2),
    denoiser=DenoiserConfig(widths=(8, 8, 8, 8), noise_width=8, mirrored=True),
    autoencoder_stage=AutoencoderStage(steps=10, batch=4),
    denoiser_stage=DenoiserStage(steps=20, batch=4, rounds=(0.5,)),
)
weights = train(config, out / "run")
print(f"weights: {weights}")

# 4. Detect with it, in a patient that it was not trained on.
new = phantom(seed=9, spacing_mm=4.0, sequences=("flair",))
detection = ddmd.detect({"flair": new.images["flair"]}, weights=weights)
print(f"after {config.denoiser_stage.steps} steps: {detection.summary}")
detection.save(out / "results", overwrite=True, overlay=True)

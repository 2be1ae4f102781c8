"""The weighted mean of two trained systems of which one was trained on from the other.

Model soups (Wortsman et al. 2022, arXiv 2203.05482): the mean of weights that share their beginning is often
better than either, and costs nothing at inference. The share is for validation patients to choose:
`python -m ddmd.training.weight_average FIRST SECOND --share 0.5 -o WEIGHTS`, then `python -m ddmd.training.threshold`.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from ddmd.models import checkpoint
from ddmd.models.checkpoint import System, WeightsError

AGREED = (
    "system", "sequences", "grid", "schedule", "autoencoder", "denoiser", "discrepancy_scale",
    "use_inter", "use_intra",
)  # fmt: skip


@torch.no_grad()
def average(first: System, second: System, share: float) -> System:
    """A new system, float32: (1 - share) of the first's weights and `share` of the second's.

    It is described as the second is, which was trained on from the first, and says what it is a mean of. The
    threshold of neither holds for the mean, which has one half until one is chosen. The other criteria of lesions are
    those of the second until then.

    Parameters
    ----------
    first, second : systems of float32 on one device, as `ddmd.weights.load(..., precision="float32")` gives them
    share : between 0 (the first) and 1 (the second)

    Raises
    ------
    ValueError
        If the share is not between 0 and 1.
    WeightsError
        If the two differ in kind, labels or licence, in their networks or in what these are given.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share is {share}; allowed are 0 to 1")
    mine, other = first.description, second.description
    agreed = {name: (getattr(mine, name), getattr(other, name)) for name in AGREED}
    agreed |= {name: (mine.training.get(name), other.training.get(name)) for name in ("labels", "licence")}
    for name, (one, two) in agreed.items():
        if one != two:
            raise WeightsError(f"{name} is {one} in the first and {two} in the second; means need the same")
    training = other.training | {"mean_with": mine.training, "share": share}
    mean = checkpoint.build(
        dataclasses.replace(other, threshold=0.5, threshold_chosen="one half", training=training)
    )
    for part, module in mean.parts().items():
        others = second.parts()[part].state_dict()
        module.load_state_dict(
            {key: value.lerp(others[key], share) for key, value in first.parts()[part].state_dict().items()}
        )
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the second")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    try:
        first, second = (
            checkpoint.load(path, precision="float32") for path in (options.first, options.second)
        )
        checkpoint.save(average(first, second, options.share), options.output)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

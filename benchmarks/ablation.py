"""What each part of the method brings: the same training without it, the same patients, one table.

`python -m benchmarks.ablation [CONFIG] -o RUNS [--only NAME ...]` trains, chooses each system's threshold on
validation patients, evaluates on test patients and writes benchmarks/results/ablation-DATE.json. A run that was
killed goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddmd.evaluation import evaluate
from ddmd.training import train
from ddmd.training.config import TrainConfig, read_config
from ddmd.training.threshold import choose

RESULTS = Path(__file__).with_name("results")
FIGURES = ("dice", "dice_oracle", "precision", "recall", "uncertainty_auroc", "slice_auroc")


def variants(config: TrainConfig) -> dict[str, TrainConfig]:
    """The whole method, and it without one part at a time."""

    def encoders(**changed: Any) -> TrainConfig:
        return replace(config, autoencoder_stage=replace(config.autoencoder_stage, **changed))

    def denoiser(**changed: Any) -> TrainConfig:
        return replace(config, denoiser_stage=replace(config.denoiser_stage, **changed))

    return {
        "whole": config,
        "without X": denoiser(use_inter=False),
        "without Y": denoiser(use_intra=False),
        "without L_homo": encoders(homogeneous=0.0),
        "without L_hetero": encoders(heterogeneous=0.0),
        "without X and Y": denoiser(use_inter=False, use_intra=False),
        "without pseudo-masks": denoiser(rounds=(), masked=0.0),
        "without diffusion": replace(config, system="supervised"),
        "anomaly detection": replace(config, system="anomaly"),
        "pixel labels": replace(config, labels="pixel"),
        "pixel labels, without diffusion": replace(
            denoiser(use_inter=False, use_intra=False), labels="pixel", system="supervised"
        ),
    }


def measure(name: str, config: TrainConfig, folder: Path) -> list[dict[str, Any]]:
    """Figures of one variant; of the whole, also with one sample."""
    path = train(config, folder)
    threshold = choose(folder, path)
    rows = []
    for samples in (None, 1) if name == "whole" else (None,):
        report = evaluate(
            config.data[0].root, weights=str(path), split=folder / "split.json", samples=samples
        )
        mean, low, high = report.intervals["dice"]
        row = {"system": f"{name}, S = 1" if samples == 1 else name, "threshold": threshold}
        row |= {figure: report.pooled[figure] for figure in FIGURES}
        rows.append(row | {"mean_dice": mean, "low": low, "high": high, "patients": len(report.patients)})
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", default=Path(__file__).with_name("ablation.toml"))
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="*", help="names of variants")
    options = parser.parse_args()
    config, rows = read_config(options.config), []
    for name, variant in variants(config).items():
        if not options.only or name in options.only:
            rows += measure(name, variant, options.output / name.replace(" ", "-").replace(",", ""))
    target = RESULTS / f"ablation-{datetime.date.today()}.json"
    target.write_text(json.dumps({"config": options.config.name, "rows": rows}, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()

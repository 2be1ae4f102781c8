"""What each part of the method brings: the same training without it, the same patients, one table.

`python -m benchmarks.ablation [CONFIG] -o RUNS [--only NAME ...]` trains, chooses each system's threshold on
validation patients, evaluates on test patients and writes benchmarks/results/ablation-DATE.json of all that are
finished in RUNS. A run that was killed goes on. Variants that differ in the denoiser alone share the
auto-encoders of the whole.

`python -m benchmarks.shipped_ablation` takes shipped weights apart instead, without training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddmd.evaluation.evaluate import evaluate
from ddmd.training import train
from ddmd.training.config import TrainConfig, read_config
from ddmd.training.threshold import choose_settings

RESULTS = Path(__file__).with_name("results")
FIGURES = ("dice", "dice_oracle", "precision", "recall", "uncertainty_auroc", "slice_auroc")


def variants(config: TrainConfig) -> dict[str, TrainConfig]:
    """The whole method, and it without one part at a time.

    Raises
    ------
    ValueError
        If the configuration has later stages: a part would be missing from the first stage alone.
    """
    if config.later_stages:
        raise ValueError("an ablation has one stage of the denoiser; leave later_stages out")

    def encoders(**changed: Any) -> TrainConfig:
        return replace(config, autoencoder_stage=replace(config.autoencoder_stage, **changed))

    mirror = replace(config, denoiser=replace(config.denoiser, mirrored=not config.denoiser.mirrored))

    def denoiser(**changed: Any) -> TrainConfig:
        return replace(config, denoiser_stage=replace(config.denoiser_stage, **changed))

    return {
        "whole": config,
        "without X": denoiser(use_inter=False),
        "without Y": denoiser(use_intra=False),
        "without L_homo": encoders(homogeneous=0.0),
        "without L_hetero": encoders(heterogeneous=0.0),
        "without X and Y": denoiser(use_inter=False, use_intra=False),
        "without pseudo-masks": denoiser(rounds=(), share_masked=0.0),
        "without bags": denoiser(bag_weight=0.0),
        "without teacher uncertainty": denoiser(teacher_uncertainty=False),
        "without symmetric mirrors": denoiser(share_symmetric=0.0),
        f"{'without' if config.denoiser.mirrored else 'with'} the mirror image": mirror,
        "without diffusion": replace(config, system="supervised"),
        "anomaly detection": replace(config, system="anomaly"),
        "pixel labels": replace(config, labels="pixel"),
        "pixel labels, without diffusion": replace(
            denoiser(use_inter=False, use_intra=False), labels="pixel", system="supervised"
        ),
    }


def borrow_autoencoders(config: TrainConfig, whole: TrainConfig, folder: Path, lender: Path) -> None:
    """Copy the auto-encoders that the whole system was trained with, where this variant's would be the same."""
    if config.autoencoder_stage != whole.autoencoder_stage or config.labels != whole.labels:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in lender.glob("autoencoders_?.checkpoint.safetensors"):
        if not (folder / path.name).exists():
            shutil.copy(path, folder)


def measure(name: str, config: TrainConfig, folder: Path) -> list[dict[str, Any]]:
    """Figures of one variant; of the whole, also with one sample. They are kept in its folder."""
    kept = folder / "figures.json"
    if kept.exists():
        return json.loads(kept.read_text())
    path, rows = train(config, folder), []
    (_setting, choice), *_tried = choose_settings(folder, path)
    for samples in (None, 1) if name == "whole" else (None,):
        report = evaluate(
            config.data[0].root, weights=str(path), split=folder / "split.json", samples=samples
        )
        mean, low, high = report.intervals["dice"]
        row = {"system": f"{name}, S = 1" if samples == 1 else name, "threshold": choice.threshold}
        row |= {figure: report.pooled[figure] for figure in FIGURES}
        rows.append(row | {"mean_dice": mean, "low": low, "high": high, "patients": len(report.patients)})
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    kept.write_text(json.dumps(rows))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", default=Path(__file__).with_name("ablation.toml"))
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="*", help="names of variants")
    options = parser.parse_args()
    config, rows = read_config(options.config), []
    folders = {name: options.output / name.replace(" ", "-").replace(",", "") for name in variants(config)}
    for name, variant in variants(config).items():
        wanted = not options.only or name in options.only
        if wanted and name != "whole":
            borrow_autoencoders(variant, config, folders[name], folders["whole"])
        if wanted or (folders[name] / "figures.json").exists():
            rows += measure(name, variant, folders[name])
    target = RESULTS / f"ablation-{datetime.date.today()}.json"
    target.write_text(json.dumps({"config": options.config.name, "rows": rows}, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()

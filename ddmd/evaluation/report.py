"""An evaluation as one HTML page: tables, curves, and the best, median and worst case."""

from __future__ import annotations

import base64
import html as escape
import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ddmd.evaluation.evaluate import Report

STYLE = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em;text-align:right}"


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _curves(report: Report) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2))
    left, middle, right = figure.subplots(1, 3)
    c = report.curves
    left.plot(c["threshold"], c["dice_by_threshold"])
    left.axvline(report.how["threshold"], linestyle=":")
    left.set(xlabel="threshold", ylabel="pooled Dice", ylim=(0, 1))
    middle.plot([100 * v for v in c["left_out"]], c["dice_by_left_out"], marker="o")
    middle.set(xlabel="least certain voxels left out (%)", ylabel="pooled Dice")
    right.plot(c["calibration_probability"], c["calibration_share"], marker="o")
    right.plot([0, 1], [0, 1], linestyle=":")
    right.set(xlabel="probability", ylabel="share that is lesion")
    figure.tight_layout()
    return _png(figure)


def _cases(report: Report) -> str:
    from matplotlib.figure import Figure

    if not report.pictures:
        return ""
    figure = Figure(figsize=(11, 4))
    axes = np.atleast_1d(figure.subplots(1, len(report.pictures)))
    for ax, (title, picture) in zip(axes, report.pictures.items(), strict=True):
        ax.imshow(picture["image"], cmap="gray", vmin=-2.5, vmax=4, origin="lower")
        for key, colour in (("truth", "lime"), ("found", "red")):
            if picture[key].any():
                ax.contour(picture[key], [0.5], colors=colour, linewidths=1)
        ax.set_title(title, fontsize=9)
        ax.axis("off")
    return _png(figure)


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{escape.escape(h)}</th>" for h in head)
    lines = ["<tr>" + "".join(f"<td>{escape.escape(v)}</td>" for v in row) + "</tr>" for row in body]
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def _show(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def html(report: Report) -> str:
    """The page, self-contained."""
    figures = [["figure", "pooled", "mean over patients", "95 % interval"]]
    for name in dict.fromkeys((*report.pooled, *report.intervals)):
        mean, low, high = report.intervals.get(name, (None,) * 3)
        figures.append([
            name.replace("_", " "), _show(report.pooled[name]) if name in report.pooled else "",
            "" if mean is None else _show(mean), "" if mean is None else f"{low:.3f} to {high:.3f}",
        ])  # fmt: skip
    names = list(report.patients[0])
    rows = [names, *[[_show(row[n]) for n in names] for row in report.patients]]
    how = _table([["setting", "value"], *[[k, str(v)] for k, v in report.how.items()]])
    return (
        f"<!doctype html><meta charset=utf-8><title>ddmd evaluation</title><style>{STYLE}</style>"
        f"<h1>Evaluation of {escape.escape(report.how['weights'])}</h1>"
        "<p>For research, not diagnosis. Accuracy stands beside that of an empty mask; the oracle columns "
        "choose the threshold that suits the masks best, which no user can.</p>"
        f"{_table(figures)}<h2>Curves</h2>{_curves(report)}"
        f"<h2>Cases</h2><p>Red: found. Green: the annotator's.</p>{_cases(report)}"
        f"<h2>Patients</h2>{_table(rows)}<h2>How</h2>{how}\n"
    )

"""An evaluation as files: metrics.json, per_patient.csv, failures.csv, and one HTML page with curves and cases."""

from __future__ import annotations

import base64
import html as markup
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddmd.evaluation.summary import FIGURES, Report
from ddmd.io.atomic import write_text
from ddmd.io.text import json_text, printable, table_text, without_folders

STYLE = (
    "body{font:15px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em;text-align:right}"
    "figure{display:inline-block;margin:.5em}figcaption{max-width:22em}"
)
FILES = ("metrics.json", "per_patient.csv", "report.html", "failures.csv")


class EvaluationError(ValueError):
    """An evaluation that cannot be made; the message says what to do."""


def check_report_folder(folder: str | Path, overwrite: bool) -> None:
    """Raise EvaluationError where a report could not be written to the folder, before it is computed."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"{folder}: is a file; name a folder for the report")
    earlier = [name for name in FILES if os.path.lexists(folder / name)]
    if earlier and not overwrite:
        raise EvaluationError(
            f"{folder}: holds an earlier evaluation ({earlier[0]}); pass --overwrite (overwrite=True) or another folder"
        )
    above = folder
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise EvaluationError(f"{folder}: cannot be written to; choose another folder")


def write_report(report: Report, folder: str | Path) -> None:
    """Write the files of a report, each whole or not at all; no folder of this machine is named in them.

    Raises
    ------
    EvaluationError
        If the folder cannot be written to.
    """
    folder = Path(folder)
    metrics = {
        "pooled": report.pooled,
        "intervals": report.intervals,
        "curves": report.curves,
        "provenance": report.provenance,
        "failures": _failures(report),
    }
    texts = {
        "metrics.json": json_text(metrics),
        "per_patient.csv": _csv(report.patients),
        "report.html": html(report),
    }
    if report.failures:
        texts["failures.csv"] = _csv(_failures(report))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text(folder / name, text)
        if not report.failures:
            (folder / "failures.csv").unlink(missing_ok=True)
    except OSError as error:
        raise EvaluationError(f"{folder}: cannot be written to ({error}); choose another folder") from None


def _failures(report: Report) -> list[dict[str, str]]:
    rows = []
    for failure in report.failures:
        # the folder's own name may hold blanks, so it is taken out before any other path
        message = failure.message.replace(f"{Path(failure.file).parent}{os.sep}", "")
        rows.append(asdict(failure) | {"file": Path(failure.file).name, "message": without_folders(message)})
    return rows


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with every column that any row has."""
    return table_text(rows, list(dict.fromkeys(name for row in rows for name in row)), ",")


@contextmanager
def _default_matplotlib() -> Iterator[None]:
    """Matplotlib with its own defaults, whatever matplotlibrc or MPLBACKEND the user has."""
    if "matplotlib" in sys.modules:
        import matplotlib
    else:
        backend = os.environ.pop(
            "MPLBACKEND", None
        )  # what it names need not be installed: the import would fail
        try:
            import matplotlib
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):  # for the rest of the process the user's choice stands
            matplotlib.rcParams["backend"] = backend or matplotlib.rcParams["backend"]
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        yield


def _png(width: float, height: float, draw: Callable[[Any], None]) -> str:
    """An <img> of what `draw` puts on a figure; a line of text where it cannot be drawn."""
    try:
        with _default_matplotlib():
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure

            figure = Figure(figsize=(width, height))
            FigureCanvasAgg(figure)
            draw(figure)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    except Exception as error:  # the figures are worth more than the picture
        return f"<p>This picture could not be drawn: {_text(type(error).__name__)}.</p>"
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _curves(report: Report) -> str:
    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        c = report.curves
        left.plot(c["threshold"], c["dice_by_threshold"])
        if "threshold" in report.provenance:
            left.axvline(report.provenance["threshold"], linestyle=":")
        left.set(xlabel="threshold", ylabel="pooled Dice", ylim=(0, 1))
        middle.plot([100 * v for v in c["rejected_share"]], c["dice_by_rejected_share"], marker="o")
        middle.set(xlabel="least certain voxels left out (%)", ylabel="pooled Dice")
        right.plot(c["calibration_probability"], c["calibration_share"], marker="o")
        right.plot([0, 1], [0, 1], linestyle=":")
        right.set(xlabel="probability", ylabel="share that is lesion")
        figure.tight_layout()

    return _png(11, 3.2, draw)


def _cases(report: Report) -> str:
    """One picture a case; its name is in the page, never in the picture."""
    figures = []
    for caption, picture in report.pictures.items():

        def draw(figure: Any, picture: Mapping[str, Any] = picture) -> None:
            ax = figure.subplots()
            ax.imshow(picture["image"], cmap="gray", vmin=-2.5, vmax=4, origin="lower")
            for key, colour in (("truth", "lime"), ("mask", "red")):
                if picture[key].any():
                    ax.contour(picture[key], [0.5], colors=colour, linewidths=1)
            ax.axis("off")

        figures.append(f"<figure>{_png(3.6, 4, draw)}<figcaption>{_text(caption)}</figcaption></figure>")
    return "".join(figures)


def _text(value: Any) -> str:
    """A value as printable text with HTML's characters escaped."""
    return markup.escape(f"{value:.3f}" if isinstance(value, float) else printable(value))


def _table(rows: Sequence[Sequence[Any]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{_text(h)}</th>" for h in head)
    lines = ["<tr>" + "".join(f"<td>{_text(v)}</td>" for v in row) + "</tr>" for row in body]
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def html(report: Report) -> str:
    """The page, self-contained."""
    figures: list[Sequence[Any]] = [("figure", "pooled", "mean over patients", "95 % interval")]
    for name in report.names():
        mean, low, high = report.intervals.get(name, (None,) * 3)
        spread = ("", "") if mean is None else (mean, f"{low:.3f} to {high:.3f}")
        figures.append((FIGURES.get(name, name), report.pooled.get(name, ""), *spread))
    columns = list(dict.fromkeys(name for row in report.patients for name in row))
    rows = [
        [FIGURES.get(name, name.replace("_", " ")) for name in columns],
        *[[row.get(name, "") for name in columns] for row in report.patients],
    ]
    sections = [
        f"<h2>Figures</h2>{_table(figures)}<h2>Curves</h2>{_curves(report)}<h2>Cases</h2>"
        f"<p>Red: detected. Green: the annotator's.</p>{_cases(report)}<h2>Patients</h2>{_table(rows)}"
        if report.patients
        else "<p>No case could be evaluated.</p>"
    ]
    if report.failures:
        failures = _failures(report)
        table = _table([list(failures[0]), *[list(row.values()) for row in failures]])
        sections.append(f"<h2>Cases that failed</h2>{table}")
    settings = _table([("setting", "value"), *report.provenance.items()])
    return (
        f"<!doctype html><meta charset=utf-8><title>ddmd evaluation</title><style>{STYLE}</style>"
        f"<h1>Evaluation of {_text(report.provenance.get('weights', ''))}</h1>"
        "<p>For research, not diagnosis. Accuracy stands beside that of an empty mask; the oracle figures "
        f"choose the threshold that suits the masks best, which no user can.</p>{''.join(sections)}"
        f"<h2>Settings</h2>{settings}\n"
    )

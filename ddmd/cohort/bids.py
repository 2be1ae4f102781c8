"""A BIDS data set in, BIDS derivatives out: places and names of results, the description, the group's tables."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ddmd
from ddmd.cohort.cases import Case
from ddmd.cohort.errors import DatasetError
from ddmd.cohort.folders import is_output_folder
from ddmd.cohort.pipeline import CohortRun, plan_cohort
from ddmd.cohort.run_tables import COHORT_COLUMNS, FAILURE_COLUMNS, cohort_row
from ddmd.cohort.work import Task
from ddmd.io.atomic import write_text
from ddmd.io.naming import name_hash
from ddmd.io.results import BIDS_NAMES, OutputError, read_result, result_name
from ddmd.io.text import json_text, printable, table_text

BIDS_VERSION = "1.10.0"
RAW = "raw"  # what BIDS URIs call the data set that the images are of
NOT_OF_IMAGES = ("space", "res", "den", "label", "desc")  # entities of derivatives; results have their own
IGNORED = (
    "*_lesions.tsv", "*_overlay.png", "*_result.json", "*_discrepancy.nii.gz", "*_discrepancy.json",
    "cohort*.tsv", "failures*.tsv", "run*.json", "report*", "*.html",
)  # fmt: skip
INCOMPLETE = (
    "its files are not complete, or were changed after they were written; run the participant level again"
)
README = """# Lesions found by ddmd

For research, not diagnosis. Of each image, beside its name:

- `space-orig_label-L_mask`: 1 in lesions
- `space-orig_label-L_probseg`: the probability of a lesion
- `space-orig_label-L_desc-variance_probseg`: the variance of the drawn masks
- `space-orig_desc-lesions_dseg`: n in the n-th lesion of `_lesions.tsv`
- `_lesions.tsv`, `_overlay.png`, `_result.json`: a table, a picture, and all that was found

`cohort.tsv` has a row an image, `failures.tsv` those without a result.
"""


@dataclass(frozen=True)
class BidsRun:
    """Which images of a data set are worked on, and where their results go.

    Parameters
    ----------
    root : the data set
    out : folder of the derivatives
    participants, sessions : labels, with or without "sub-" and "ses-"; empty for all
    """

    root: Path
    out: Path
    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        """What names of the tables end in: the labels, or a hash of them where there are many."""
        parts = [f"sub-{label}" for label in _labels(self.participants, "sub-")]
        parts += [f"ses-{label}" for label in _labels(self.sessions, "ses-")]
        text = "_".join(parts)
        return "" if not parts else f"_{text}" if len(text) <= 60 else f"_labels-{name_hash(text)}"

    def select(self, cases: Sequence[Case]) -> list[Case]:
        """The cases of the labels that are asked for.

        Raises
        ------
        DatasetError
            If nothing has one of the labels.
        """
        chosen = list(cases)
        wanted = (("sub", "participant", self.participants), ("ses", "session", self.sessions))
        for entity, word, labels in wanted:
            if not labels:
                continue
            there = {case.entities.get(entity) for case in cases} - {None}
            for label in _labels(labels, f"{entity}-"):
                if label not in there:
                    known = ", ".join(sorted(filter(None, there))[:10]) or "none"
                    raise DatasetError(
                        f"{self.root}: no image of {word} {label} that can be used; there are {known}"
                    )
            chosen = [c for c in chosen if c.entities.get(entity) in _labels(labels, f"{entity}-")]
        if not chosen:
            raise DatasetError(f"{self.root}: no image has one of the participants and one of the sessions")
        return chosen

    def place(self, cases: Sequence[Case], sequences: Sequence[str]) -> list[Task]:
        """Where the result of each case goes.

        Parameters
        ----------
        cases : all of the data set
        sequences : what the weights take; results name these files as their sources
        """
        listed = list(cases)
        stems = {case.name: _bids_stem(case) for case in listed}
        count = Counter(stem.casefold() for stem in stems.values())
        tasks = []
        for case in listed:
            entities = case.entities
            folder = self.out / f"sub-{entities['sub']}"
            if "ses" in entities:
                folder /= f"ses-{entities['ses']}"
            uris = [self._uri(path) for s in sequences for path in case.files.get(s, ())]
            extra = {"Sources": uris, "SpatialReference": uris[0] if uris else "orig", "Type": "Lesion"}
            stem = stems[case.name]
            if count[stem.casefold()] > 1:  # names that BIDS does not allow beside each other
                stem = f"{stem}-{name_hash(case.name)}"
            tasks.append(Task(case, stem, folder / "anat", extra=extra))
        return tasks

    def _uri(self, path: Path) -> str:
        inside = os.path.relpath(os.path.abspath(path), os.path.abspath(self.root))
        return f"bids:{RAW}:{printable(Path(inside).as_posix())}"

    def check(self) -> None:
        """Refuse a folder for the results that is the data set itself, or another data set.

        Raises
        ------
        OutputError
            If it is.
        """
        if os.path.realpath(self.out) == os.path.realpath(self.root):
            raise OutputError(
                f"{self.out}: is the data set itself; choose {self.out / 'derivatives' / 'ddmd'}"
            )
        if (self.out / "dataset_description.json").exists() and not is_output_folder(
            self.out, list(os.scandir(self.out))
        ):
            raise OutputError(f"{self.out}: is another data set; choose another folder for the results")

    def write_description(self) -> None:
        """Write dataset_description.json, README.md and .bidsignore.

        Raises
        ------
        OutputError
            If the folder cannot be written to.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            ignore = self.out / ".bidsignore"
            lines = ignore.read_text(errors="surrogateescape").splitlines() if ignore.exists() else []
            lines += [line for line in IGNORED if line not in lines]
            write_text(ignore, "\n".join(lines) + "\n")
            if not (self.out / "README.md").exists():
                write_text(self.out / "README.md", README)
            write_text(self.out / "dataset_description.json", json_text(self._description()))
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be written to ({error}); choose another folder") from None

    def _description(self) -> dict[str, Any]:
        link = Path(os.path.relpath(os.path.realpath(self.root), os.path.realpath(self.out))).as_posix()
        source = {"URL": f"bids:{RAW}:"}
        doi = _raw_description(self.root).get("DatasetDOI")
        if isinstance(doi, str):
            source["DOI"] = printable(doi)
        return {
            "Name": "Lesions found by ddmd",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "ddmd", "Version": ddmd.__version__}],
            "SourceDatasets": [source],
            "DatasetLinks": {RAW: printable(link)},
        }


def plan_bids(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    participants: Sequence[str] = (),
    sessions: Sequence[str] = (),
    **options: Any,
) -> CohortRun:
    """Plan a run over a BIDS data set whose results are BIDS derivatives.

    Parameters
    ----------
    root : the data set
    out : folder of the derivatives, made if it is not there
    participants, sessions : labels, with or without "sub-" and "ses-"; empty for all
    **options
        As `plan_cohort` takes them.

    Raises
    ------
    DatasetError
        If the data set holds no image that can be used, or none of a label.
    OutputError
        If `out` is the data set itself, another data set, or holds results that are not to be replaced.
    """
    bids = BidsRun(Path(root), Path(out), tuple(participants), tuple(sessions))
    bids.check()
    run = plan_cohort(
        [bids.root], bids.out, layout="bids", select=bids.select, place=bids.place, naming=BIDS_NAMES,
        **{"tables": True, "tag": bids.tag, **options},
    )  # fmt: skip
    bids.write_description()
    return run


def write_group_tables(out: Path) -> tuple[int, int]:
    """Write cohort.tsv and failures.tsv of all results below a folder of derivatives.

    Failures are those that runs over participants wrote down, of images that have no result since, and results
    whose files are not complete.

    Returns
    -------
    (images with a result, images that failed)

    Raises
    ------
    DatasetError
        If there is neither a result nor a failure.
    OutputError
        If the folder cannot be written to.
    """
    rows: dict[str, tuple[str, dict[str, object]]] = {}
    damaged: dict[str, Mapping[str, str]] = {}
    for path in sorted(out.glob("sub-*/**/*_result.json")):
        stem = path.name.removesuffix("_result.json")
        summary = read_result(stem, path.parent)
        if summary is None:
            name = result_name(stem, path.parent) or stem
            damaged[name] = {
                "case": name,
                "file": path.name,
                "error": "IncompleteResult",
                "reason": INCOMPLETE,
            }
            continue
        name = str(summary.get("Name"))
        subject = path.relative_to(out).parts[0]
        rows[name] = (_first_source(summary), cohort_row(name, subject, summary))
    failures = {name: row for name, row in damaged.items() if name not in rows}
    for path in sorted(out.glob("failures*.tsv")):
        for row in _failure_rows(path):
            if row["case"] not in rows and row.get("error") != "IncompleteResult":
                failures[row["case"]] = row
    if not rows and not failures:
        raise DatasetError(f"{out}: no result here; run the participant level first")
    ordered = [row for _, row in sorted(rows.values(), key=lambda item: item[0])]
    failed = sorted(failures.values(), key=lambda row: row["case"])
    try:
        write_text(out / "cohort.tsv", table_text(ordered, COHORT_COLUMNS))
        write_text(out / "failures.tsv", table_text(failed, FAILURE_COLUMNS))
    except OSError as error:
        raise OutputError(f"{out}: cannot be written to ({error})") from None
    return len(ordered), len(failed)


def _failure_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table of failures that name a case; DatasetError where it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file, delimiter="\t") if row.get("case")]
    except (OSError, UnicodeError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read as a table ({error}); delete it") from None


def _first_source(summary: Mapping[str, Any]) -> str:
    sources = summary.get("Sources")
    return str(sources[0]) if isinstance(sources, list) and sources else str(summary.get("Name"))


def _labels(labels: Iterable[str], prefix: str) -> list[str]:
    return sorted({label.removeprefix(prefix) for label in labels})


def _bids_stem(case: Case) -> str:
    return "_".join(f"{key}-{value}" for key, value in case.entities.items() if key not in NOT_OF_IMAGES)


def _raw_description(root: Path) -> Mapping[str, Any]:
    try:
        described = json.loads((root / "dataset_description.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return described if isinstance(described, dict) else {}

"""The tables of a run over a cohort: cohort.tsv, failures.tsv and run.json."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddmd.cohort.cases import Case
from ddmd.cohort.work import CaseError, CohortOptions, SystemFacts
from ddmd.io.atomic import write_texts
from ddmd.io.results import OutputError
from ddmd.io.text import json_text, table_text

COHORT_COLUMNS = (
    "case", "patient", "lesion_ml", "lesion_ml_low", "lesion_ml_high", "lesions", "score", "brain_ml", "flags",
    "seconds", "device",
)  # fmt: skip
FAILURE_COLUMNS = ("case", "file", "error", "reason")


@dataclass(frozen=True)
class RunTables:
    """Where the tables of a run are, and what they say of it.

    Parameters
    ----------
    out : folder of the tables
    tag : what their names end in, where several runs share the folder
    options, facts : of the run
    run : further keys of run.json
    """

    out: Path
    tag: str
    options: CohortOptions
    facts: SystemFacts
    run: Mapping[str, Any]

    def write(
        self,
        cases: Sequence[Case],
        done: Mapping[str, Mapping[str, Any]],
        failures: Mapping[str, CaseError],
    ) -> None:
        """Write each table whole, its rows in the order of the cases.

        Raises
        ------
        OutputError
            If the folder cannot be written to.
        """
        rows = [cohort_row(case.name, case.patient, done[case.name]) for case in cases if case.name in done]
        failed = [vars(failures[case.name]) for case in cases if case.name in failures]
        summary = {
            **self.options.description(self.facts),
            "Weights": self.facts.weights,
            "Maps": list(self.options.maps),
            "Overlay": self.options.overlay,
            **self.run,
            "Device": self.facts.device,
            "Python": platform.python_version(),
            "Torch": torch.__version__,
            "System": f"{platform.system()} {platform.machine()}",
            "Processors": os.cpu_count(),
            "Cases": len(cases),
            "Done": len(rows),
            "Failed": len(failed),
        }
        contents = {
            f"cohort{self.tag}.tsv": table_text(rows, COHORT_COLUMNS),
            f"failures{self.tag}.tsv": table_text(failed, FAILURE_COLUMNS),
            f"run{self.tag}.json": json_text(summary),
        }
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_texts(self.out, f"cohort{self.tag}", contents)
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be written to ({error}); choose another folder") from None


def cohort_row(case: str, patient: str, summary: Mapping[str, Any]) -> dict[str, object]:
    """A row of cohort.tsv, of what the JSON of a result says."""
    low, high = summary.get("LesionMlInterval") or ("", "")
    return {
        "case": case,
        "patient": patient,
        "lesion_ml": summary.get("LesionMl", ""),
        "lesion_ml_low": low,
        "lesion_ml_high": high,
        "lesions": summary.get("Lesions", ""),
        "score": summary.get("Score", ""),
        "brain_ml": summary.get("BrainMl", ""),
        "flags": "; ".join(summary.get("Quality", {}).get("Flags", [])),
        "seconds": summary.get("Seconds", ""),
        "device": summary.get("Device", ""),
    }

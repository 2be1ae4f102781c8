"""What splits by patient promise."""

from collections import Counter
from pathlib import Path

import pytest

from ddmd.cohort.cases import Case, DatasetError
from ddmd.cohort.splits import read_split, split_by_patient, write_split


def many(count: int, source: str) -> list[Case]:
    """Two scans of every patient."""
    files = {"flair": (Path("x.nii"),)}
    return [Case(f"{source}{i // 2}", f"{source}{i}", source, files) for i in range(2 * count)]


def test_a_patient_is_in_one_part_and_every_source_in_all(seed):
    cases = many(50, "lgg") + many(20, "ms")
    split = split_by_patient(cases, seed=seed)
    assert split == split_by_patient(cases[::-1], seed=seed)
    assert set(split) == {c.patient for c in cases}
    for source, counts in (("lgg", (35, 5, 10)), ("ms", (14, 2, 4))):
        found = Counter(part for patient, part in split.items() if patient.startswith(source))
        assert (found["train"], found["validation"], found["test"]) == counts
    assert any(split != split_by_patient(cases, seed=seed + i) for i in range(1, 4))


def test_a_patient_of_two_sources_is_in_one_part(seed):
    files = {"flair": (Path("x.nii"),)}
    cases = [Case(f"p{i}", f"{s}{i}", s, files) for s in ("a", "b") for i in range(30)]
    assert len(split_by_patient(cases, seed=seed)) == 30


def test_a_split_is_read_as_it_was_written(tmp_path, seed):
    split = split_by_patient(many(9, "a"), seed=seed)
    write_split(tmp_path / "split.json", split)
    assert read_split(tmp_path / "split.json") == split


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "null", "3", "NaN", '"x"', '{"a": 1}', '{"a": null}', '{"a": ["train"]}', "[" * 100_000,
     '{"a": "train", "a": "test"}', '{"a": "evil"}', '{"a": "train"', "\0"],
)  # fmt: skip
def test_what_is_no_split_is_refused(tmp_path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(DatasetError, match=r"split\.json.*(give the split\.json|save the table)"):
        read_split(tmp_path / "split.json")


def test_a_split_that_is_no_text_or_no_file_is_refused(tmp_path):
    (tmp_path / "split.json").write_bytes(b"\xed\xa0\x80")
    for path in (tmp_path / "split.json", tmp_path, Path("/dev/zero"), tmp_path / "gone.json"):
        with pytest.raises(DatasetError, match=path.name):
            read_split(path)


def test_fractions_add_to_one():
    with pytest.raises(DatasetError, match="fractions are"):
        split_by_patient(many(3, "a"), {"train": 0.7, "test": 0.7})

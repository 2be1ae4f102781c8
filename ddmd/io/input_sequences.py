"""Which sequence each input image is, and which of them the weights take."""

from __future__ import annotations

from collections.abc import Sequence

from ddmd.io.errors import VolumeError
from ddmd.io.inputs import InputImage
from ddmd.io.sequences import SEQUENCES


def sequence_names(sequences: str | Sequence[str] | None) -> list[str]:
    if sequences is None:
        return []
    names = [sequences] if isinstance(sequences, str) else sequences
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise VolumeError(f"sequences is {sequences!r}; give a name or a list of names")
    return [n.lower() for n in names]


def images_by_sequence(
    images: list[InputImage], names: list[str], require: Sequence[str], notes: list[str]
) -> dict[str, InputImage]:
    """The images by sequence, each with one, and all that are required."""
    if names and len(names) != len(images):
        raise VolumeError(f"{len(images)} images and {len(names)} sequence names; give one name each")
    chosen: dict[str, InputImage] = {}
    for i, image in enumerate(images):
        sequence = names[i] if names else image.sequence
        if sequence is None and image.other_modality:
            raise VolumeError(
                f"{image.label}: its name says that it is none of {', '.join(SEQUENCES)}; give one of them, or "
                "name the sequence if it is one"
            )
        if sequence is None and len(images) == 1 and len(require) == 1:
            sequence = require[0]
            notes.append(f"{image.label}: its name does not say which sequence it is; taken as {sequence}")
        if sequence not in SEQUENCES:
            raise VolumeError(
                f"{image.label}: sequence {sequence or 'not recognised from the name'}; name it as one of "
                f"{', '.join(SEQUENCES)}"
            )
        if sequence in chosen:
            raise VolumeError(
                f"{chosen[sequence].label} and {image.label} both claim to be {sequence}; give one"
            )
        chosen[sequence] = image
    missing = [s for s in require if s not in chosen]
    if missing:
        raise VolumeError(
            f"{', '.join(image.label for image in chosen.values())}: the weights need {', '.join(require)} and "
            f"the input lacks {', '.join(missing)}; add it, or name the sequence if it is there"
        )
    return chosen


def images_taken(
    chosen: dict[str, InputImage], require: Sequence[str], optional: Sequence[str], others_too: bool
) -> dict[str, InputImage]:
    """The images that weights take, in the order in which they take them; the others after them if asked for."""
    taken = [s for s in dict.fromkeys((*require, *optional)) if s in chosen]
    if not taken:
        raise VolumeError(
            f"{', '.join(image.label for image in chosen.values())}: the weights take {', '.join(optional)} and the "
            f"input has {', '.join(chosen)}; add one of them"
        )
    others = [s for s in chosen if s not in taken] if others_too else []
    return {s: chosen[s] for s in (*taken, *others)}

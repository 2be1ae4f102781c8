"""Mutants of weights files: lengths, JSON, types, shapes, offsets, descriptions and numbers."""

from __future__ import annotations

import copy
import json
import random
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ddmd.inference.detector import Detector
from ddmd.models import checkpoint
from tests.fuzz.mutants import BYTES, FLOATS, NUMBERS, Mutant, changed_bytes
from tests.volumes import head, tiny_system

OTHERS = (None, True, False, "x", "", [], {}, [1], {"x": 1}, [10**6] * 4, "a" * 10_000, "../../x", "[/red]")
DTYPES = ("F16", "F32", "F64", "BF16", "I8", "I16", "I64", "U8", "BOOL", "F8_E4M3", "Q9", "", 3)


@cache
def _original() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.safetensors"
        checkpoint.save(tiny_system(3), path)
        return path.read_bytes()


def _parts() -> tuple[dict[str, Any], bytes]:
    raw = _original()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _packed(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _any_value(rng: random.Random) -> Any:
    return rng.choice(rng.choice((NUMBERS, FLOATS, OTHERS)))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, v in inner for p in ((*path, key), *_places(v, (*path, key)))]


def _changed_json(rng: random.Random, value: Any) -> str:
    path = rng.choice(_places(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    kind = rng.random()
    if kind < 0.1 and isinstance(inner, dict):
        del inner[path[-1]]
        return f"without {path}"
    if kind < 0.15 and isinstance(inner, dict):
        inner["surplus"] = _any_value(rng)
        return f"surplus beside {path}"
    inner[path[-1]] = _any_value(rng)
    return f"{path} = {str(inner[path[-1]])[:40]}"


def _changed_tensor(rng: random.Random, header: dict[str, Any]) -> str:
    name = rng.choice([k for k in header if k != "__metadata__"])
    entry = header[name]
    kind = rng.choice(("dtype", "shape", "reversed", "offsets", "swapped", "missing", "renamed", "twice"))
    if kind == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == "shape":
        entry["shape"] = rng.choice(([-1], [2**40], [2**33, 2**33], [], [0], "x", [1.5], None))
    elif kind == "reversed":
        entry["shape"] = entry["shape"][::-1]
    elif kind == "offsets":
        entry["data_offsets"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
    elif kind == "swapped":
        entry["data_offsets"] = entry["data_offsets"][::-1]
    elif kind == "missing":
        del header[name]
    elif kind == "renamed":
        header["evil../../x"] = header.pop(name)
    else:
        other = rng.choice([k for k in header if k != "__metadata__"])
        header[other] = copy.deepcopy(entry)
    return f"tensor {name}: {kind}"


def _changed_numbers(rng: random.Random, header: dict[str, Any], body: bytes) -> tuple[bytes, str]:
    numbers = np.frombuffer(body, np.float16).copy()
    special = np.float16(rng.choice((float("nan"), float("inf"), -float("inf"), 65504.0, 0.0)))
    if rng.random() < 0.5:
        entry = header[rng.choice([k for k in header if k != "__metadata__"])]
        start = entry["data_offsets"][0] // 2
        numbers[start : start + 1] = special
        return numbers.tobytes(), f"one number {special}"
    numbers[:] = special
    return numbers.tobytes(), f"all numbers {special}"


def _use(folder: Path) -> None:
    detector = Detector.load(folder / "mutant.safetensors", "cpu", "float32")
    values, affine = head(np.random.default_rng(5), (20, 24, 4), (8.0, 8.0, 8.0))
    result = detector.detect({s: values for s in detector.system.description.sequences}, affine=affine)
    assert np.isfinite(np.asarray(result.probability.dataobj)).all(), "maps are not finite"


def mutant(rng: random.Random) -> Mutant:
    """A weights file with one kind of damage."""
    header, body = _parts()
    choice = rng.random()
    if choice < 0.5:
        description = json.loads(header["__metadata__"]["ddmd"])
        what = "description: " + _changed_json(rng, description)
        header["__metadata__"]["ddmd"] = json.dumps(description)
        content = _packed(header, body)
    elif choice < 0.55:
        text = rng.choice(("", "null", "[]", "3", '"x"', "{}", "[" * 100_000, '{"a":' * 5000, "NaN", "1e999"))
        header["__metadata__"]["ddmd"] = text
        content, what = _packed(header, body), f"description {text[:20]}"
    elif choice < 0.7:
        what = _changed_tensor(rng, header)
        content = _packed(header, body)
    elif choice < 0.8:
        body, what = _changed_numbers(rng, header, body)
        content = _packed(header, body)
    elif choice < 0.85:
        length = rng.choice(NUMBERS) % 2**64
        content, what = struct.pack("<Q", length) + _original()[8:], f"header of {length} bytes"
    elif choice < 0.9:
        header["__metadata__"] = rng.choice(
            (None, {}, 3, "x", [], {"ddmd": 3}, {"x": rng.choice(BYTES).decode("latin-1")})
        )
        content, what = _packed(header, body), "metadata"
    else:
        length = struct.unpack("<Q", _original()[:8])[0]
        content, what = changed_bytes(rng, _original(), rng.choice((8 + length, None))), "bytes"
    return Mutant({"mutant.safetensors": content}, f"weights: {what}", _use)

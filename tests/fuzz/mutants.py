"""What a mutant is, and the changes of bytes that all kinds share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NUMBERS = (0, 1, -1, 2, 3, 7, 127, 255, 256, 1023, 1024, 1025, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**63 - 1,
           2**63, 2**64 - 1, 10**6, 10**9, 10**12, 10**30, -(2**31), -(2**63))  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-300, 1e-9, 1e-3, 0.1, 12.0, 1e3, 1e9, 1e30, 3.4e38, 1e300, float("inf"),
          float("-inf"), float("nan"))  # fmt: skip
BYTES = (b"", b"\0", b"\xff\xfe", b'"', b"\n", b"\r", b",", b"\t", b"-1", b"nan", b"1e400", b"../../x", b"/dev/zero",
         b"99999999999999999999", b"'", b"\xc2\xa0", b"=1+1", b"{", b"]", b"null", b"%s%n", b"[/b]", b"\xed\xa0\x80")  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """Files to write into an empty folder, and what is then done with them.

    files : name in the folder -> content.
    what : the change, in words.
    use : called with the folder; raises what the library raises, or AssertionError for a wrong result.
    """

    files: dict[str, bytes]
    what: str
    use: Callable[[Path], None]

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def changed_bytes(rng: random.Random, content: bytes, within: int | None = None) -> bytes:
    """A few bytes of the first `within` changed, inserted, removed, or the whole cut, repeated or emptied."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        end = min(within or len(data), len(data))
        if not end:
            return bytes(data)
        at = rng.randrange(end)
        kind = rng.random()
        if kind < 0.45:
            data[at] = rng.randrange(256)
        elif kind < 0.6:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.85:
            data[at : at + rng.choice((0, 1, 1, 4, 8))] = rng.choice(BYTES)
        elif kind < 0.93:
            del data[at : at + rng.choice((1, 4, 100, len(data)))]
        else:
            data[at:at] = data[max(0, at - 200) : at] * rng.choice((1, 3))
    return bytes(data)

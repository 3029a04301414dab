"""What a damaged checkpoint is, and how bytes are damaged."""

from dataclasses import dataclass

import numpy as np

LOAD, REFUSE, MAY = "must load", "must be refused", "may load or be refused"


@dataclass(frozen=True)
class Mutant:
    """A checkpoint: its files by name, the one that `sinks.load` gets ("" for their folder), and what must happen."""

    files: dict[str, bytes]
    entry: str
    must: str
    what: str


def damaged_bytes(
    rng: np.random.Generator, raw: bytes, start: int = 0, stop: int = 0
) -> tuple[bytes, str, str]:
    """Bytes cut off, flipped or overwritten between `start` and `stop` (0: the end); what must happen; what was done."""
    stop, out = stop or len(raw), bytearray(raw)
    kind = rng.integers(5)
    if kind == 0:
        n = int(rng.integers(start, len(raw)))
        return raw[:n], REFUSE, f"cut off at byte {n} of {len(raw)}"
    if kind == 1:
        at, n = int(rng.integers(start, stop)), int(rng.integers(1, 64))
        del out[at : at + n]
        return bytes(out), MAY, f"{n} bytes missing at {at}"
    if kind == 2:
        at, n = int(rng.integers(start, stop)), int(rng.integers(1, 64))
        out[at : at + n] = rng.integers(0, 256, len(out[at : at + n]), dtype=np.uint8).tobytes()
        return bytes(out), MAY, f"{n} random bytes at {at}"
    places = rng.integers(start, stop, rng.integers(1, 4))
    for at in places:
        out[at] ^= 1 << int(rng.integers(8))
    return bytes(out), MAY, f"a bit flipped in bytes {places.tolist()}"

"""Frames that are almost right: valid ones of every kind, changed at random from a seed."""

from __future__ import annotations

import random
import re
import struct
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onehop.protocol import wire

VECTORS = Path(__file__).parents[1] / "protocol" / "vectors"
LENGTHS = (0, 1, 4, 15, 16, 17, 0x7F, 0xFF, 0x100, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0xFFFF_FFFF)
IDS = (0, 1, 2, 3, 4095, 4096, 4097, 2**32, 2**63, 2**64 - 1)


class Fuzz:
    """Messages without end, the same for the same seed."""

    def __init__(self, seed: int, node: bytes) -> None:
        self.random = random.Random(seed)
        # All the files are arrays of one name, so their texts can be read as one.
        text = "".join(path.read_text() for path in sorted(VECTORS.glob("*.toml")))
        found = [bytes.fromhex(re.sub(r"#.*", "", each["hex"])) for each in tomllib.loads(text)["vector"]]
        names = wire.names("echo", "", "echo")

        def request(kind: int, flags: int, id: int) -> bytes:
            frame = wire.request(kind, flags, id, 5.0, None, names, b"\x92\x90\x80")
            assert isinstance(frame, bytes)
            return frame

        self.seeds = [
            *found,
            wire.hello(wire.Hello(node, bytes(16))),
            *(request(kind, 0, id) for kind in (wire.REQUEST, wire.CAST) for id in range(1, 6)),
            request(wire.REQUEST, wire.STREAM, 7),
            *(wire.pack(kind, id=id) for kind in wire.KINDS for id in range(1, 4)),
        ]

    def frame(self) -> bytes:
        """One frame: sometimes valid, mostly not quite, sometimes noise."""
        pick = self.random
        frame = bytearray(pick.choice(self.seeds))
        for _ in range(pick.choice((0, 0, 0, 1, 1, 1, 2, 3, 8))):
            at = pick.randrange(len(frame)) if frame else 0
            match pick.randrange(9):
                case 0 if frame:
                    frame[at] ^= 1 << pick.randrange(8)
                case 1 if frame:
                    frame[at] = pick.choice((0, 1, 0x7F, 0x80, 0xFF))
                case 2:
                    del frame[at:]
                case 3:
                    frame[at:at] = pick.randbytes(pick.randrange(1, 40))
                case 4:
                    frame[at:] = pick.choice(self.seeds)[at:]
                case 5 if frame:
                    frame[0] = pick.choice((*wire.KINDS, 0, 8, 22, 255))
                case 6 if len(frame) >= 16:
                    struct.pack_into("<H", frame, 2, pick.choice(LENGTHS) & 0xFFFF)
                case 7 if len(frame) >= 16:
                    struct.pack_into("<I", frame, 4, pick.choice(LENGTHS))
                case 8 if len(frame) >= 16:
                    struct.pack_into("<Q", frame, 8, pick.choice((*IDS, pick.randrange(1, 20_000))))
        return bytes(frame) if pick.random() < 0.98 else pick.randbytes(pick.randrange(200))

    def second(self, frame: bytes) -> bytes | None:
        """What comes behind a frame: mostly what its flag says."""
        wanted = wire.has_second_frame(frame) != (self.random.random() < 0.1)
        return self.random.choice((b"", b"\x92\x90\x80", bytes(wire.SECOND_FRAME_FROM))) if wanted else None

    def message(self) -> list[bytes]:
        """One to six frames."""
        parts = self.random.choice((1, 1, 1, 1, 2, 2, 3, 4, 5, 6))
        return [self.frame() for _ in range(parts)]

    def frames(self, count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield self.frame()


def resident() -> int:
    """Bytes of memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture
def make_fuzz() -> type[Fuzz]:
    return Fuzz


@pytest.fixture
def memory() -> Callable[[], int]:
    return resident

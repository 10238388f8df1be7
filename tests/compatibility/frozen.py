"""Make and read each frozen vector, in whichever release this process has; says what differs. Run from the root."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.protocol.test_vectors import KIND_NAMES, decode, encode, frame_of, meaning

import onehop
from onehop.protocol import wire

vectors: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
different = []
known = [
    each
    for each in vectors
    if each.get("kind") in KIND_NAMES.values() and hasattr(wire, each.get("feature", "VERSION"))
]
for vector in known:
    if encode(vector) != frame_of(vector):
        different.append(f"made: {vector['name']}")
    if decode(frame_of(vector)) != meaning(vector):
        different.append(f"read: {vector['name']}")
print(json.dumps({"different": different, "vectors": len(known), "release": onehop.__file__}))

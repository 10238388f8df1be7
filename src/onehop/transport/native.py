"""The compiled twin of the few functions that every message passes, where it was built.

pyzmq gives the interpreter's lock away at each send and receive, although these never wait; with many threads a fight
for it begins each time. The compiled functions keep it. Everything works without them, by pyzmq alone.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "ONEHOP_PURE"
"""In the environment, not empty: the compiled functions are not used."""


def _load() -> Any:
    if os.environ.get(VARIABLE):
        return None
    try:
        from zmq.backend.cython import _zmq

        from onehop.transport import _native
    except ImportError:  # it was not built here, or this pyzmq has another backend
        return None
    try:
        _native.bind(_zmq.__file__)
    except ImportError:  # this pyzmq's libzmq cannot be reached
        return None
    return _native


native: Any = _load()
"""The module ``_native``, or None."""
compiled = native is not None
"""Whether what every message passes is compiled code."""

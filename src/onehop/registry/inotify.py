"""The kernel's notices about one directory, without a package for it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from pathlib import Path
from typing import NamedTuple

_CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _DELETE = 0x8, 0x40, 0x80, 0x200
_Q_OVERFLOW, _IGNORED = 0x4000, 0x8000
_ONLYDIR = 0x0100_0000

_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows

_FIONREAD = 0x541B  # how many bytes can be read; where it has another number, ioctl refuses this one
_NO_BYTES = bytes(4)


class Changes(NamedTuple):
    """What happened in the directory since the last reading.

    Attributes:
        names: files that came, went or were replaced.
        closed: files that somebody stopped writing to; so too when a process dies that held one open.
        incomplete: notices were lost, or the directory itself is gone: look at everything.
    """

    names: set[str]
    closed: set[str]
    incomplete: bool


class Inotify:
    """One inotify instance that watches one directory.

    Raises:
        OSError: the system has no inotify, or none left (``fs.inotify.max_user_instances``).
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "inotify_init1"):
            raise OSError("this system has no inotify")
        self._add_watch = libc.inotify_add_watch
        self._watched = (0, 0)
        self.descriptor = _checked(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def watch(self, directory: Path) -> None:
        """Watch ``directory``, or do so again where it was removed and made anew."""
        mask = _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _DELETE | _ONLYDIR
        _checked(self._add_watch(self.descriptor, os.fsencode(directory), mask))
        self._watched = _identity(directory)

    def watches(self, directory: Path) -> bool:
        """Whether ``directory`` is the one that is watched, and not another that was made in its place."""
        return _identity(directory) == self._watched

    def is_quiet(self) -> bool:
        """Whether :meth:`read` would tell nothing."""
        return fcntl.ioctl(self.descriptor, _FIONREAD, _NO_BYTES) == _NO_BYTES

    def read(self) -> Changes:
        """What happened; call it when the descriptor is readable."""
        changes = Changes(set(), set(), False)
        try:
            data = os.read(self.descriptor, 65_536)
        except BlockingIOError:
            return changes
        at = 0
        while at < len(data):
            _, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            name = os.fsdecode(data[at - length : at].rstrip(b"\0"))
            if mask & (_Q_OVERFLOW | _IGNORED):
                changes = changes._replace(incomplete=True)
            elif mask & _CLOSE_WRITE:
                changes.closed.add(name)
            else:
                changes.names.add(name)
        return changes

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.descriptor)


def _identity(directory: Path) -> tuple[int, int]:
    found = os.stat(directory)
    return found.st_dev, found.st_ino


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result

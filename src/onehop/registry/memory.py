"""The registry of nodes inside one process: always fresh, never away. For tests."""

from __future__ import annotations

import threading
from collections.abc import Callable

from onehop.interfaces import Deliver, Record


class Records:
    """The records that the registries made by :meth:`registry` share."""

    def __init__(self) -> None:
        self._telling = threading.RLock()
        self._members: list[MemoryRegistry] = []

    def registry(self) -> MemoryRegistry:
        """One node's view of these records."""
        return MemoryRegistry(self)

    def change(self, member: MemoryRegistry, action: Callable[[], None], *, stays: bool = True) -> None:
        """Apply ``action`` for ``member`` and tell everybody who watches."""
        with self._telling:
            if stays and member not in self._members:
                self._members.append(member)
            before = self._view()
            action()
            view = self._view()
            for each in list(self._members):
                if each.deliver is not None and (view != before or each is member):
                    each.deliver(view)
            if not stays and member in self._members:
                self._members.remove(member)

    def _view(self) -> list[Record]:
        records = [each.record for each in self._members if each.record is not None]
        return sorted(records, key=lambda record: record.node)


class MemoryRegistry:
    """See :class:`onehop.interfaces.Registry`."""

    def __init__(self, records: Records) -> None:
        self.record: Record | None = None
        self.deliver: Deliver | None = None
        self._records = records

    def _hold(self, record: Record | None) -> None:
        self.record = record

    def announce(self, record: Record) -> None:
        self._records.change(self, lambda: self._hold(record))

    def withdraw(self) -> None:
        if self.record is not None:
            self._records.change(self, lambda: self._hold(None))

    def watch(self, deliver: Deliver) -> None:
        def begin() -> None:
            self.deliver = deliver

        self._records.change(self, begin)

    def refresh(self) -> None:
        """Nothing: every change is told at once."""

    def close(self) -> None:
        self.deliver = None
        self._records.change(self, lambda: self._hold(None), stays=False)

    def forget(self) -> None:
        self.deliver = None
        self.record = None

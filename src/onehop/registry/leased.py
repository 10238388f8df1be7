"""Registries on a database with leases (ZooKeeper, etcd, Redis): what they have in common, and what each has to do.

A node has one lease, and under it one key for each service that it offers: ``<realm>/services/<service>/<node id>``.
The value is the node's record with that service alone. So who uses a service follows that service and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class StoreAway(OSError):
    """The database does not answer, or not in time. It may be back later; the sentence says what happened where."""


class LeaseLost(Exception):
    """The database does not know our lease any more: it expired, or the data was lost. Everything is to be put anew."""


class Tell(Protocol):
    """What a store tells of changes, from a thread of its own; both return at once and never raise."""

    def changed(self, service: str, node: str, value: bytes | None, *, withdrawn: bool = False) -> None:
        """One key's latest state, in the order in which the database made the changes.

        Args:
            value: its content; None where the key is gone.
            withdrawn: whether the node itself took it away, and not the end of its lease or somebody else.
        """

    def broke(self, why: str) -> None:
        """Nothing more is told: the connection is gone, or changes were missed. :meth:`Store.connect` follows."""


class Store(Protocol):
    """One node's connection to one database. Each method may wait for ``patience`` seconds; one thread calls them all.

    The realm is a part of each key. Service and realm may hold any character: they are quoted. A key or a value that
    is none of ours is told as it is; who reads it says what is wrong.

    Raises of all methods:
        StoreAway: the database cannot be reached at this moment.
        RegistryError: it can never work like this (a wrong password, no permission); says what to change.
    """

    def connect(self, tell: Tell) -> None:
        """Begin anew, whatever was before: connect to any of the servers. A lease is taken when it is first needed.

        ``tell`` hears of what happens from now on, and nothing of what an earlier connection still brings.
        """

    def follow(self, service: str) -> Mapping[tuple[str, str], bytes]:
        """All values of ``service`` now, by (service, node id); their later changes are told.

        Without a gap: what happens after the moment of this answer is told, and nothing from before it. ``""`` stands
        for all services. Following what is followed already reads it once more.
        """

    def publish(self, node: str, values: Mapping[str, bytes]) -> None:
        """Put our keys, under our lease: the value of each service that ``node`` offers.

        All other keys of ours are withdrawn: of services that are not named, and of the node id that we had before.

        What another session of ours left (an earlier lease, not yet expired) must not take them away again.

        Raises:
            LeaseLost: it ended meanwhile; :meth:`keep` makes another.
        """

    def withdraw(self) -> None:
        """Take our keys away; those who follow hear that we did it ourselves."""

    def keep(self) -> None:
        """Renew our lease, and see that our keys are there. Called three times in the length of a lease.

        Raises:
            LeaseLost: it is gone, or a key is; a new lease is taken at the next :meth:`publish`.
        """

    def close(self) -> None:
        """End the lease, if the database can be reached, and give everything back. Never raises."""

    def forget(self) -> None:
        """In a forked child: let go of everything without a message to anybody."""

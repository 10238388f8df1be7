"""The contract that others may implement: a registry, and the record it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a registry says of one node.

    Attributes:
        node: the node id, 32 lower-case hexadecimal digits; new at every start and after every fork.
        host: the name of the host the node runs on.
        pid: its process id there, for people who look.
        endpoints: ZeroMQ addresses that reach it, best first (``ipc:///run/...``).
        services: for each service offered, the names of the servers (instances) that offer it. A name stands
            as often as it is served: two instances of one name in a process are two entries.
        idempotent: for each service, the methods that may run again after an unknown outcome.
        version: the release of onehop that wrote the record.
        zone: a label for locality.
        state: ``"serving"`` or ``"draining"``.
        relay: whether the node passes large fan-outs on for others.
        key: reserved for the node's public key; empty until keys are built.
        grant: reserved for the signed statement that goes with the key; empty until grants are built.
    """

    node: str
    host: str
    pid: int = 0
    endpoints: tuple[str, ...] = ()
    services: dict[str, tuple[str, ...]] = {}
    idempotent: dict[str, tuple[str, ...]] = {}
    version: str = ""
    zone: str = ""
    state: str = "serving"
    relay: bool = False
    key: str = ""
    grant: str = ""


Deliver = Callable[[Sequence[Record]], None]


class Registry(Protocol):
    """Where records live. One instance belongs to one node, and is used from any of its threads.

    Nothing happens at construction. After a fork the child forgets the instance and makes a new one; it calls
    :meth:`forget` on the inherited one first. ``onehop.testing.contracts.check_registry`` says whether an
    implementation is right.

    A registry may be away: at the start, for minutes, or with all it knew lost. Then nothing here raises because of
    it: what was announced is announced again when it is back, and the last view stays.

    Attributes:
        addresses: host and port of each of its servers. A node listens beyond its host only where there is one, and
            there at the address from which the first of them is reached.
    """

    addresses: Sequence[tuple[str, int]] = ()

    def announce(self, record: Record) -> None:
        """Publish ``record``, or put it in the place of the one announced before.

        When it returns, other nodes can see the record, or will within a registry's stated delay; a registry that is
        away is waited for a moment only. The record lives until :meth:`withdraw`, or until this process dies.

        Raises:
            RegistryError: it cannot be published, and no waiting would mend it; the sentence says what to change.
        """

    def withdraw(self) -> None:
        """Take the announced record back. Does nothing if there is none."""

    def watch(self, deliver: Deliver) -> None:
        """Call ``deliver`` with the records of all who offer a wanted service (:meth:`want`), once before returning
        and then at every change.

        ``deliver`` always gets the whole view, without the records of dead nodes, in a stable order. Where the
        registry delivers only what is wanted, a record holds only those of its services. It is called from a thread
        of the registry (or the caller's, inside any method), never twice at once.

        Raises:
            RegistryError: the registry cannot be used at all; the sentence says what to change.
        """

    def want(self, service: str, timeout: float) -> bool:
        """From now on deliver who offers ``service`` too; ``""`` stands for all services. May be asked again.

        A registry that delivers everything need not know.

        Args:
            timeout: seconds to wait at most, until who offers it now has been delivered.

        Returns:
            Whether that was delivered; by a registry that is away, as far as it is known from before.
        """
        return True

    def refresh(self) -> None:
        """Look again now; if something changed, ``deliver`` is called before this returns. A cheap hint.

        A registry whose changes come by themselves may do nothing. Never raises for a registry that is away.
        """

    def is_fresh(self) -> bool:
        """Whether everything that was announced before this was asked has been delivered. Never waits.

        Asked before each fan-out: where it is False, which is always right, :meth:`refresh` is called.
        """
        return False

    def close(self) -> None:
        """Withdraw, end the watch, give everything back. May be called twice."""

    def forget(self) -> None:
        """Release what a fork inherited without disturbing the parent: no withdrawal, no unlocking, no message."""

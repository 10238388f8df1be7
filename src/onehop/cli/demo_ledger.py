"""The demo's ledger: what was sent, what became of it, who ran it; and whether it adds up.

Each process of the demo writes one line an event, at once, to a file of its own, so that one which is killed leaves
all it knew. The times are of the monotonic clock, which the processes of a host share.

    S  id  verb  topic  host  time     about to be sent (verb: of VERBS, long is a call whose handler works a while;
                                       host: the named server, or "")
    E  id  outcome  time               how that ended for the sender
    R  id  host  time                  a handler of host begins to run it
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from time import monotonic
from typing import NamedTuple

SERVERS = {
    "conductor": ("conductor-1", "conductor-2", "conductor-3"),
    "scheduler": ("scheduler-1",),
    "compute": ("compute-1", "compute-2", "compute-3", "compute-4", "compute-5"),
}
TOPICS = {"conductor": ("conductor",), "scheduler": ("scheduler",), "compute": ("compute", "compute-alt")}
RECEIVERS = {topic: SERVERS[role] for role, topics in TOPICS.items() for topic in topics}
CALL_TIMEOUT = 5.0
"""Seconds that a caller waits."""
VERBS = ("call", "long", "cast", "fanout")
CALLS = ("call", "long")
OUTCOMES = ANSWERED, RAISED, REFUSED, UNKNOWN = "answered", "raised", "refused", "unknown"
BEFORE_A_KILL, AFTER_A_KILL = 1.0, 1.0
"""Seconds around a kill in which a message may have been in the hands of the process that was killed."""
AFTER_A_POWER_CUT = 8.0
"""Seconds, likewise, where the whole host went: nobody is told, and all notice by its silence, after 7 s at most."""
GRACE = 2.0
"""Seconds that a caller may hear of its deadline late on a crowded machine."""


class Writer:
    """One process's part of the ledger."""

    def __init__(self, directory: Path, name: str) -> None:
        self._file = os.open(directory / f"{name}.{os.getpid()}.ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, *fields: object) -> float:
        """One event, now; returns that time."""
        now = monotonic()
        os.write(self._file, ("\t".join(map(str, fields)) + f"\t{now:.6f}\n").encode())
        return now


class Entry:
    """One message."""

    __slots__ = ("ended", "host", "outcome", "ran", "sender", "sent", "topic", "verb")

    def __init__(self) -> None:
        self.verb = self.topic = self.host = ""
        self.sender = 0
        self.sent = self.ended = 0.0
        self.outcome = ""
        self.ran: list[str] = []


class Outage(NamedTuple):
    """A process that was killed: its host, its id, when, and when it was back (infinity: never).

    ``unnoticed``: seconds in which others may not know it yet.
    """

    host: str
    pid: int
    began: float
    ended: float = float("inf")
    unnoticed: float = AFTER_A_KILL


class Line(NamedTuple):
    """The ledger of one verb. A fan-out counts once for each receiver that there is.

    ``sent`` = ``answered`` + ``refused`` + ``unknown``; ``raised`` are those of the answered that were an exception.
    Casts and fan-outs are answered where a receiver ran them. A fan-out's copy is refused for a receiver that is away.
    """

    verb: str
    sent: int
    answered: int
    raised: int
    refused: int
    unknown: int
    executed: int
    twice: int


class Ledger:
    """All parts together; :meth:`read` takes in what was written since."""

    def __init__(self, directory: Path) -> None:
        self.entries: dict[str, Entry] = {}
        self.ran_at: Counter[str] = Counter()
        self.sent_by: Counter[int] = Counter()
        self._directory = directory
        self._read: dict[Path, int] = {}

    def read(self) -> None:
        """Take in the lines that are new."""
        for path in sorted(self._directory.glob("*.ledger")):
            begin = self._read.get(path, 0)
            with open(path, "rb") as file:
                file.seek(begin)
                data = file.read()
            end = data.rfind(b"\n") + 1
            self._read[path] = begin + end
            pid = int(path.name.split(".")[-2])
            for line in data[:end].decode().splitlines():
                self._take(pid, *line.split("\t"))

    def _take(self, pid: int, kind: str, id: str, *fields: str) -> None:
        entry = self.entries.get(id)
        if entry is None:
            entry = self.entries[id] = Entry()
        if kind == "S":
            entry.verb, entry.topic, entry.host = fields[:3]
            entry.sent, entry.sender = float(fields[3]), pid
            self.sent_by[pid] += 1
        elif kind == "E":
            entry.outcome, entry.ended = fields[0], float(fields[1])
        else:
            entry.ran.append(fields[0])
            self.ran_at[fields[0]] += 1

    def open_calls(self, killed: Iterable[int]) -> int:
        """How many messages still have no outcome, or have not run where they must; senders that were killed aside."""
        killed = set(killed)
        return sum(
            not entry.outcome or (entry.verb == "cast" and entry.outcome == ANSWERED and not entry.ran)
            for entry in self.entries.values()
            if entry.sender not in killed
        )

    def works_at(self, host: str) -> bool:
        """Whether a long call runs at ``host``, by what is known."""
        return any(entry.verb == "long" and not entry.outcome and host in entry.ran for entry in self.entries.values())

    def lines(self, outages: list[Outage]) -> list[Line]:
        """The totals of each verb."""
        return [self._line(verb, outages) for verb in VERBS]

    def _line(self, verb: str, outages: list[Outage]) -> Line:
        of_verb = [entry for entry in self.entries.values() if entry.verb == verb]
        executed = sum(len(entry.ran) for entry in of_verb)
        twice = sum(len(entry.ran) - len(set(entry.ran) if verb == "fanout" else entry.ran[:1]) for entry in of_verb)
        count = Counter(entry.outcome for entry in of_verb)
        if verb in CALLS:
            sent, answered, refused = len(of_verb), count[ANSWERED] + count[RAISED], count[REFUSED]
        elif verb == "cast":
            sent, answered = len(of_verb), sum(bool(entry.ran) for entry in of_verb)
            refused = sum(entry.outcome == REFUSED and not entry.ran for entry in of_verb)
        else:
            sent = sum(len(RECEIVERS[entry.topic]) for entry in of_verb)
            answered = sum(len(set(entry.ran)) for entry in of_verb)
            refused = sum(
                host not in entry.ran and any(each.host == host and each.began < entry.sent for each in outages)
                for entry in of_verb
                for host in RECEIVERS[entry.topic]
            )
        return Line(verb, sent, answered, count[RAISED], refused, sent - answered - refused, executed, twice)

    def latencies(self, verb: str) -> list[float]:
        """Seconds that answered calls took, or that casts and fan-outs took to return; sorted."""
        return sorted(
            entry.ended - entry.sent
            for entry in self.entries.values()
            if entry.verb == verb and entry.outcome in (ANSWERED, RAISED)
        )

    def heard(self, outage: Outage) -> tuple[int, float]:
        """How many callers were told that the outcome is unknown when a process was killed, and the slowest's seconds.

        Counted are calls under way at that moment whose sender lived on.
        """
        waits = [
            entry.ended - outage.began
            for entry in self.entries.values()
            if entry.verb in CALLS and entry.outcome == UNKNOWN and self._may_be_with(entry, outage, entry.host)
        ]
        return len(waits), max(waits, default=0.0)

    def problems(self, outages: list[Outage]) -> list[str]:
        """Each way in which the ledger does not add up, in a sentence."""
        killed = {outage.pid for outage in outages}
        found = []
        for id, entry in self.entries.items():
            where = f"{entry.verb} {id} to {entry.host or entry.topic}"
            if not entry.verb:
                found.append(f"message {id} was run by {entry.ran} and never sent")
                continue
            most = len(set(entry.ran)) if entry.verb == "fanout" else 1
            if len(entry.ran) > most:
                found.append(f"{where} ran {len(entry.ran)} times: {', '.join(entry.ran)}")
            if entry.sender in killed:
                continue
            if not entry.outcome:
                found.append(f"{where} has no outcome: silence")
            elif entry.ended - entry.sent > CALL_TIMEOUT + GRACE:
                found.append(f"{where} ended after {entry.ended - entry.sent:.1f} s; {CALL_TIMEOUT:g} are allowed")
            elif entry.outcome not in OUTCOMES:
                found.append(f"{where} could not be sent: {entry.outcome}")
            if entry.verb in CALLS:
                if entry.outcome in (ANSWERED, RAISED) and not entry.ran:
                    found.append(f"{where} was answered and nobody ran it")
                if entry.outcome == UNKNOWN and not any(self._may_be_with(entry, each, entry.host) for each in outages):
                    found.append(f"{where} has an unknown outcome though nobody was killed")
                if entry.outcome == REFUSED and entry.ran:
                    found.append(f"{where} was said not to have run, and {entry.ran[0]} ran it")
            elif entry.outcome == ANSWERED:
                wanted = RECEIVERS[entry.topic] if entry.verb == "fanout" else (entry.host or entry.topic,)
                for host in wanted:
                    missed = host not in entry.ran if entry.verb == "fanout" else not entry.ran
                    if missed and not any(self._may_be_with(entry, each, host) for each in outages):
                        found.append(f"{where} was accepted and {host} never ran it")
        return found

    def _may_be_with(self, entry: Entry, outage: Outage, host: str) -> bool:
        """Whether ``entry``, sent to ``host`` (or to any of its topic), may have been with the killed process."""
        service = outage.host.partition("-")[0]
        addressed = host == outage.host or (host in ("", entry.topic) and entry.topic.startswith(service))
        # A fan-out goes to those who are there, and a call to the one who is away waits for it.
        waits = entry.verb == "fanout" or (entry.verb in CALLS and entry.host)
        until = max(outage.began + outage.unnoticed, outage.ended + AFTER_A_KILL if waits else 0.0)
        overlaps = entry.sent <= until and max(entry.sent, entry.ended) >= outage.began - BEFORE_A_KILL
        return addressed and overlaps


def percentile(values: list[float], part: float) -> float:
    """Of sorted ``values``; 0 of none."""
    return values[min(len(values) - 1, int(len(values) * part))] if values else 0.0

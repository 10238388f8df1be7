"""What must survive what, row by row: each is one run of real processes under load, judged by its bound and its ledger.

The tests run the short forms; ``soak.py`` the long ones.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable
from itertools import count
from time import monotonic, sleep
from typing import Any, NamedTuple

from onehop.testing.chaos import figures, plan
from onehop.testing.chaos.cluster import Cluster
from onehop.testing.hosts import Hosts
from onehop.testing.ledger import AGAIN, CALL, FAILED, Entry, Ledger, Outage

BACK = 5.0
"""Seconds after an outage within which a server has work again, and all is answered at the full rate."""
OUT_OF_ROTATION = 6.0
DETECTED = 7.0
KNOWN = 0.1
"""Seconds after a kill in which a request may still be sent there: until the closed connection is seen."""
SLOW = 1.0
"""Seconds that a request does not take unless somebody is out."""
NOISY = 0.1
"""Seconds for which a machine holds a process up that is no measure of rates."""
BUSY, TRIES = 0.02, 3
"""Seconds for which a machine holds a process up that does other things too; and how many chances a row has there."""
WARM = 2.0
RESTART = 0.5
"""Seconds after which a killed server is started again, when all must have been well without it for so long."""
WORK = 0.05
"""Seconds that a handler works where some requests have to be with whoever is struck."""
ONLY_CALLS = {CALL: 7.0, AGAIN: 3.0}
PAUSES, HANGS = (plan.PAUSE, "SIGSTOP"), (plan.HANG, "every worker waits for a lock")


class Row(NamedTuple):
    """One row: what was done, the figures, and in what it falls short.

    Attributes:
        broken: what must not be, however slow the machine is.
        slow: times and rates that are not as promised.
        stall: seconds for which the machine held a process up.
    """

    name: str
    what: str
    figures: dict[str, Any]
    broken: list[str]
    slow: list[str]
    stall: float

    @property
    def short(self) -> list[str]:
        """All in which it falls short."""
        return [*self.broken, *self.slow]

    def told(self) -> str:
        """For people, on one line."""
        shown = "; ".join(f"{name}: {value}" for name, value in self.figures.items())
        return f"{self.name}  {self.what}: {shown}" + (f"  BROKEN: {self.short[:5]}" if self.short else "")


def holds(run: Callable[[], Row]) -> None:
    """Fail unless the row holds. Where it is only slow, and so was the machine, it is run again."""
    for _ in range(TRIES):
        row = run()
        print(row.told())
        if row.broken or not row.slow or row.stall < BUSY:
            break
    assert row.short == [], row.told()


class Judge:
    """Collects the figures of a row, and in what it falls short.

    A time may be longer than promised by as much as the machine held a process up in this run, as timers of the
    processes tell; that is a figure too.
    """

    def __init__(self, name: str, what: str, ledger: Ledger, outages: list[Outage]) -> None:
        self.stall = ledger.worst_stall(outages)
        self._row = Row(name, what, {}, [], [], self.stall)
        self._ledger = ledger

    def figure(self, name: str, value: float | str | None) -> None:
        """A figure."""
        self._row.figures[name] = round(value, 3) if isinstance(value, float) else value

    def within(self, name: str, value: float | None, limit: float) -> None:
        """A time in seconds, which there must be, and which must be below ``limit``."""
        self.figure(name, value)
        if value is None or value >= limit + self.stall:
            self._row.slow.append(f"{name}: {value}; less than {limit:g} is promised")

    def at_most(self, name: str, value: float, limit: float) -> None:
        """A percentile, to which what held a process up now and then adds nothing."""
        self.figure(name, value)
        if value > limit:
            self._row.slow.append(f"{name}: {value:.3f}; {limit:g} at most is promised")

    def below(self, name: str, value: float, limit: float) -> None:
        """A figure that must be below ``limit``."""
        self.figure(name, value)
        if value >= limit:
            self._row.broken.append(f"{name}: {value:.3f}; less than {limit:g} is promised")

    def at_least(self, name: str, value: float, least: float) -> None:
        """A figure that must be so much."""
        self.figure(name, value)
        if value < least:
            self._row.slow.append(f"{name}: {value:.3f}; {least:g} is promised")

    def offered(self, rate: float, seconds: float) -> None:
        """So much load there must have been: what was due and not sent would have suffered."""
        sent = sum(1 for _ in self._ledger.requests)
        self.at_least("sent, of what was to be sent", sent / (rate * seconds), 0.9)

    def none(self, name: str, found: list[Entry]) -> None:
        """Of these there must be none."""
        self.figure(name, len(found))
        self._row.broken.extend(f"{name}: {each.told()}" for each in found[:10])

    def row(self, cluster: Cluster) -> Row:
        """The row, with what every ledger has to say."""
        requests = self._ledger.in_order
        seconds = max((each.ended for each in requests), default=cluster.began) - cluster.began
        self.figure("requests", len(requests))
        self.figure("a second", round(len(requests) / seconds) if seconds > 0 else 0)
        self.figure("silent", sum(not each.ends for each in requests))
        self.figure("run twice", sum(len(each.runs) > 1 and each.verb != AGAIN for each in requests))
        self.figure("the machine held a process up for, s", self.stall)
        self._row.broken.extend(self._ledger.breaches(cluster.outages))
        return self._row


def under_way(entry: Entry, outage: Outage, stall: float) -> bool:
    """Whether the request may have been there when the outage began."""
    return entry.began <= outage.ended + KNOWN + stall and entry.ended >= outage.began


def calm_p99(ledger: Ledger, since: float, seconds: float, killed: list[Outage], settle: float) -> float:
    """The 99th percentile, in seconds, of a window in which nobody was killed; on a noisy machine there are worse ones,
    and a quarter of them do not count."""
    windows = [since + number * figures.WINDOW for number in range(int(seconds / figures.WINDOW))]
    calm = [at for at in windows if not any(-figures.WINDOW < at - each.began < settle for each in killed)]
    return figures.percentile([figures.p99(figures.begun(ledger, at, at + figures.WINDOW)) for at in calm], 0.75)


def kills(*, rate: float, seconds: float, every: float, callers: int = 1, settle: float = 1.0) -> Row:
    """R1: kill -9 of one of three servers under load, again and again."""
    with Cluster(3, callers, rate=rate, timeout=5.0) as cluster:
        cluster.go()
        killed = []
        for number in count():
            at = WARM + number * every
            if at + every > seconds:
                break
            cluster.follow([], at)
            killed.append(cluster.kill(number % 3))
            cluster.follow([], at + settle + RESTART)
            cluster.start_server(number % 3).wait_ready()
        cluster.follow([], seconds)
        ledger = cluster.stop()
    judge = Judge("R1", f"kill -9 of one of three servers every {every:g} s", ledger, cluster.outages)
    calm = calm_p99(ledger, cluster.began + 0.5, seconds - 0.5, killed, settle)
    recovered = [figures.settled(ledger, each.began, each.began + settle + RESTART, 2 * calm) for each in killed]
    judge.figure("kills", len(killed))
    judge.figure("p99 in calm, ms", calm * 1000)
    slowest = None if None in recovered else max(each for each in recovered if each is not None)
    judge.within("p99 back under twice that after, s", slowest, settle + 0.001)
    judge.offered(rate, seconds)
    again = [each for each in ledger.requests if each.verb == AGAIN]
    judge.figure("idempotent calls", len(again))
    judge.none("idempotent calls not answered", [each for each in again if not each.well])
    unknown = [each for each in ledger.requests if each.outcome == FAILED and each.executed == "unknown"]
    judge.figure("unknown", len(unknown))
    judge.none(
        "unknown, and not in flight at the kill",
        [each for each in unknown if not any(under_way(each, out, judge.stall) for out in killed)],
    )  # fmt: skip
    judge.none(
        "told that it did not run",
        [each for each in ledger.requests if each.outcome == FAILED and each.executed == "no"],
    )
    return judge.row(cluster)


def hung(name: str, kind: tuple[str, str], *, rate: float, lasts: float, callers: int = 1) -> Row:
    """R2, R3: one of three servers is paused, or its workers hang; then it goes on."""
    # Few workers, so that all hang soon: who has one left that does not is served by it. And what hangs is given up
    # before it goes on, so that its reply comes late.
    workers, timeout = (4, min(10.0, lasts / 2)) if kind is HANGS else (32, 10.0)
    with Cluster(3, callers, rate=rate, timeout=timeout, threads=64, seconds=WORK, workers=workers) as cluster:
        cluster.go()
        cluster.follow([], WARM)
        end = cluster.begin(kind[0], 0)
        cluster.follow([], WARM + lasts)
        end()
        cluster.follow([], WARM + lasts + BACK + 1.5)
        ledger = cluster.stop()
        late = [sum(peer["late"] for peer in each["peers"]) for each in cluster.counts("caller")]
    judge = Judge(name, f"{kind[1]} at one of three servers for {lasts:g} s", ledger, cluster.outages)
    (outage,) = cluster.outages
    hurt = figures.suffered(ledger, outage.began - SLOW, outage.ended, SLOW)
    judge.at_least("suffered", len(hurt), 1)  # else nothing was done to them
    judge.within(
        "out of rotation after, s", max((each.began - outage.began for each in hurt), default=0.0), OUT_OF_ROTATION
    )
    waited = max((each.seconds for each in hurt), default=0.0)
    if kind is PAUSES:
        judge.within("waited at most, s", waited, DETECTED)
    else:  # what hangs may yet be answered
        judge.figure("waited at most, s", waited)
        judge.at_least("late replies dropped and counted", sum(late), 1)
    judge.offered(rate, WARM + lasts + BACK + 1.5)
    judge.within("back after, s", figures.reached(ledger, outage.name, outage.ended), BACK)
    return judge.row(cluster)


def partition(hosts: Hosts, kind: str, *, rate: float, lasts: float) -> Row:
    """R4, R5: the link to one of three servers' hosts is cut without a FIN, or bad; then it is whole again.

    Args:
        hosts: four: three for servers, one for the caller.
    """
    with Cluster(3, 1, hosts=hosts, rate=rate, timeout=10.0, threads=64, seconds=WORK, workers=32) as cluster:
        cluster.go()
        cluster.follow([], WARM)
        end = cluster.begin(kind, 0)
        cluster.follow([], WARM + lasts)
        end()
        cluster.follow([], WARM + lasts + BACK + 1.5)
        ledger = cluster.stop()
    judge = Judge(
        "R4" if kind == plan.CUT else "R5",
        f"{plan.FAULTS[kind]}, {lasts:g} s, one of three servers",
        ledger,
        cluster.outages,
    )
    (outage,) = cluster.outages
    hurt = figures.suffered(ledger, outage.began - SLOW, outage.ended, SLOW)
    judge.figure("suffered", len(hurt))
    if kind != plan.LOSSY:  # a bad link is slow, and used on
        judge.at_least("suffered", len(hurt), 1)
        judge.within(
            "new calls avoid it after, s", max((each.began - outage.began for each in hurt), default=0.0), DETECTED
        )
        judge.within(
            "callers know after, s",
            max((each.ended - max(each.began, outage.began) for each in hurt), default=0.0),
            DETECTED,
        )
    judge.within(
        "full rate after healing, s",
        figures.at_full_rate(ledger, outage.name, outage.ended, outage.ended + BACK + 1.0, rate),
        BACK,
    )
    return judge.row(cluster)


def rolling(*, rate: float, servers: int = 3, times: int = 1, callers: int = 1) -> Row:
    """R19: all servers are restarted, one after the other, each by SIGTERM, under load."""
    with Cluster(servers, callers, rate=rate, timeout=5.0, seconds=0.005, workers=16) as cluster:
        cluster.go()
        cluster.follow([], WARM)
        took = []
        for place in list(range(servers)) * times:
            took.append(cluster.terminate(place))
            cluster.start_server(place).wait_ready()
            cluster.follow([], monotonic() - cluster.began + 1.0)
        seconds = monotonic() - cluster.began
        ledger = cluster.stop()
    judge = Judge("R19", f"rolling restart of {servers} servers, {times} x", ledger, cluster.outages)
    judge.offered(rate, seconds)
    judge.figure("restarts", len(took))
    judge.within("slowest exit, s", max(took), 10.0)
    judge.none("failed", [each for each in ledger.requests if not each.well])
    judge.figure("p99, ms", figures.latency(ledger.requests)["p99"])
    judge.figure("max, ms", figures.latency(ledger.requests)["max"])
    return judge.row(cluster)


def terminated(*, rate: float, seconds: float = 2.0, callers: int = 1) -> Row:
    """R20: SIGTERM of ``onehop serve`` under load, both servers at once: nobody is left to take the calls."""
    serve = (sys.executable, "-m", "onehop", "serve", "onehop.testing.chaos.programs:Slow")
    with Cluster(2, callers, rate=rate, timeout=5.0, serve=serve, threads=64) as cluster:
        cluster.go()
        cluster.follow([], seconds)
        began = monotonic()
        for each in cluster.servers:
            each.signal(signal.SIGTERM)
        ended = [(each.process.wait(30.0), monotonic() - began) for each in cluster.servers]
        cluster.follow([], seconds + 1.0)
        ledger = cluster.stop()
    judge = Judge("R20", "SIGTERM of `onehop serve`, all servers at once", ledger, cluster.outages)
    judge.within("exit after, s", max(took for _, took in ended), 10.0)
    judge.below("exit codes other than 0", sum(code != 0 for code, _ in ended), 1)
    judge.none("accepted and not answered", figures.lost(ledger))
    judge.figure("refused afterwards", sum(not each.well for each in ledger.requests))
    return judge.row(cluster)


def extra(ledger: Ledger, refused: int, refused_calls: int) -> float:
    """What servers had to do beyond once for each request: runs, and refusals; as a part of the requests."""
    requests = sum(1 for _ in ledger.requests)
    ran, times = figures.again(ledger)
    return (times - ran + max(0, refused - refused_calls)) / requests


def killing(*, rate: float, seconds: float, pause: float = 0.15) -> Row:
    """R24, unknown: every server dies again and again, so that idempotent calls are tried again and again."""
    with Cluster(3, 1, rate=rate, timeout=3.0, mix={AGAIN: 1.0}, seconds=0.25, workers=64, threads=256) as cluster:
        cluster.go()
        cluster.follow([], WARM)
        for number in count():
            if monotonic() - cluster.began > seconds:
                break
            place = number % 3
            cluster.kill(place)
            cluster.start_server(place)
            sleep(pause)
        ledger = cluster.stop()
        retried = sum(each["retried"] for each in cluster.counts("caller"))
    judge = Judge("R24", "every server dies again and again; idempotent calls", ledger, cluster.outages)
    judge.figure("deaths", len(cluster.outages))
    judge.figure("sent again", retried)
    # With what was never sent, since its server died before it answered the hello: not an upper bound of the load.
    judge.at_most("sent again, of all", retried / len(ledger.in_order), 0.2)
    judge.below("runs beyond the first, of all", extra(ledger, 0, 0), 0.2)
    judge.figure("not answered", sum(not each.well for each in ledger.requests))
    return judge.row(cluster)


def refusing(*, rate: float, seconds: float) -> Row:
    """R24, refused: every server is full, since its workers hang, and refuses."""
    small = {"inbox_messages": 10}
    with Cluster(3, 1, rate=rate, timeout=3.0, mix=ONLY_CALLS, workers=2, settings=small, threads=128) as cluster:
        cluster.go()
        cluster.follow([], WARM)
        ends = [cluster.begin(plan.HANG, place) for place in range(3)]
        cluster.follow([], WARM + seconds)
        for each in ends:
            each()
        cluster.follow([], WARM + seconds + BACK)
        ledger = cluster.stop()
        refused = sum(each["refused"].get("full", 0) for each in cluster.counts("server"))
    judge = Judge("R24", "every server is full and refuses", ledger, cluster.outages)
    calls = Counter(each.error for each in ledger.requests if each.outcome == FAILED)
    judge.figure("refusals heard by callers", calls["Rejected(full)"])
    judge.figure("refusals by servers", refused)
    judge.below("extra load", extra(ledger, refused, calls["Rejected(full)"]), 0.2)
    return judge.row(cluster)


def overload(*, seconds: float, work: float = 0.05, workers: int = 4, callers: int = 1) -> Row:
    """R25: three times what the servers can do. Handlers wait rather than compute, so that servers are the limit, not
    the processors."""
    peak = 3 * workers / work
    small = {"inbox_messages": 2 * workers}
    options = {
        "mix": ONLY_CALLS,
        "workers": workers,
        "seconds": work,
        "settings": small,
        "timeout": 3.0,
        "threads": 128,
    }
    with Cluster(3, callers, rate=0.9 * peak, **options) as cluster:
        cluster.go()
        # The threads of the callers above wait for each other more than for servers; this one waits for servers.
        lone = cluster.add_caller(rate=50.0, threads=2)
        cluster.follow([], WARM + seconds)
        cluster.rate(3 * peak)
        over = monotonic()
        cluster.follow([], WARM + 2 * seconds)
        ledger = cluster.stop()
    judge = Judge("R25", "three times as much as the servers can do", ledger, cluster.outages)
    calm = figures.begun(ledger, cluster.began + 1.0, over)
    busy = figures.begun(ledger, over + 0.5, over + seconds)
    before = sum(each.well for each in calm) / (over - cluster.began - 1.0)
    during = sum(each.well for each in busy) / (seconds - 0.5)
    refused = [each.seconds * 1000 for each in busy if each.error == "Rejected(full)"]
    judge.figure("answered at 0.9 of what they can, a second", before)
    judge.figure("asked in overload, a second", len(busy) / (seconds - 0.5))
    judge.figure("answered in overload, a second", during)
    judge.at_least("goodput, of what they can", during / peak, 0.8)
    judge.at_least("refused", len(refused), 1)
    alone = [each.seconds * 1000 for each in busy if each.error == "Rejected(full)" and each.part.name == lone.name]
    judge.at_most("refusals of all, p50 ms", figures.percentile(refused, 0.5), 5.0)
    judge.figure("refusals of all, p99 ms", figures.percentile(refused, 0.99))
    judge.at_least("refusals of a lone caller", len(alone), 1)
    judge.at_most("refusals of a lone caller, p50 ms", figures.percentile(alone, 0.5), 5.0)
    judge.figure("refusals of a lone caller, p90 ms", figures.percentile(alone, 0.9))
    judge.figure("refusals of a lone caller, p99 ms", figures.percentile(alone, 0.99))
    return judge.row(cluster)


SHORT: dict[str, Callable[[], Row]] = {
    "kills": lambda: kills(rate=1000, seconds=WARM + 12.0, every=4.0),
    "rolling": lambda: rolling(rate=1000),
    "terminated": lambda: terminated(rate=400),
    "overload": lambda: overload(seconds=4.0),
}
SHORT_OF_LIVENESS: dict[str, Callable[[], Row]] = {
    "paused": lambda: hung("R2", PAUSES, rate=500, lasts=8.0),
    "deadlocked": lambda: hung("R3", HANGS, rate=100, lasts=8.0),
    "killing": lambda: killing(rate=400, seconds=8.0),
    "refusing": lambda: refusing(rate=500, seconds=3.0),
}
LONG: dict[str, Callable[[float], Row]] = {
    "kills": lambda part: kills(rate=2000, seconds=WARM + 600 * part, every=5.0, callers=2),
    "paused": lambda part: hung("R2", PAUSES, rate=1000, lasts=max(8.0, 30 * part)),
    "deadlocked": lambda part: hung("R3", HANGS, rate=100, lasts=max(8.0, 30 * part)),
    "rolling": lambda part: rolling(rate=1000, times=max(1, round(20 * part))),
    "terminated": lambda _: terminated(rate=400),
    "killing": lambda part: killing(rate=400, seconds=max(8.0, 60 * part)),
    "refusing": lambda part: refusing(rate=500, seconds=max(3.0, 30 * part)),
    "overload": lambda part: overload(seconds=max(4.0, 60 * part)),
}
"""By a part of the full length."""
PARTITIONS = (plan.CUT, plan.ONE_WAY, plan.DEAF, plan.LOSSY)

"""A plan that breaks something is shrunk to a few lines that still break it; and many seeds are searched at once."""

from __future__ import annotations

import pytest

from onehop.protocol.inbox import NEW, Window
from onehop.testing.engine import VirtualEngine
from onehop.testing.exploration import FAULTS, Fault, Plan, draw, play
from onehop.testing.search import Progress, Search
from onehop.testing.shrinking import rule, shrink


class Repeats(Window):
    def take(self, number: int) -> str:
        super().take(number)
        return NEW


class TakesAllForNew(VirtualEngine):
    """Runs what comes twice twice."""

    def _take(self, identity: bytes, frame: bytes, body: bytes | None) -> None:
        for sender in self.protocol.inbox.senders.values():
            sender.window = Repeats(4096)
        super()._take(identity, frame, body)


class Stumbles(VirtualEngine):
    """Cannot bear to be drained."""

    def drain(self, timeout: float) -> None:
        raise LookupError("drained")


def twice() -> Plan:
    plan = draw(3, nodes=20, seconds=5.0)
    return plan._replace(faults=(*plan.faults, Fault("twice", 1.0, 4.0, amount=0.5), Fault("crash", 2.0, 3.0, (4,))))


def test_the_shortest_plan_is_a_request_and_a_fault() -> None:
    shortest = shrink(twice(), engine=TakesAllForNew)
    assert shortest is not None
    assert shortest.is_done
    assert rule(shortest.breach) == "a handler ran again for _"
    assert len(shortest.plan.asks) == 1
    assert [fault.kind for fault in shortest.plan.faults] == ["twice"]
    assert len(shortest.plan.sites) <= 2
    assert "node" in shortest.breach.splitlines()[1]
    assert len(shortest.breach.splitlines()) < 30
    assert play(shortest.plan).broken == []
    assert play(shortest.plan, engine=TakesAllForNew).broken


def test_the_program_of_a_plan_brings_it_back() -> None:
    plan = draw(7, nodes=8, seconds=3.0)._replace(faults=twice().faults)
    program, _, check = plan.program().rpartition("\n")
    assert check == "assert play(plan).broken == []"
    given: dict[str, Plan] = {}
    exec(program, given)
    assert given["plan"] == plan
    assert play(given["plan"]).digest == play(plan).digest


def test_an_error_in_the_core_is_a_breach_that_is_shrunk() -> None:
    plan = draw(3, nodes=10, seconds=3.0)._replace(
        faults=(Fault("reset", 0.5, 0.5, (2,)), Fault("drain", 1.0, 2.0, (4, 5)))
    )
    shortest = shrink(plan, engine=Stumbles)
    assert shortest is not None
    assert rule(shortest.breach) == "LookupError: drained"
    assert (shortest.plan.asks, len(shortest.plan.faults), len(shortest.plan.sites)) == ((), 1, 1)


def test_what_breaks_nothing_is_not_shrunk() -> None:
    assert shrink(draw(3, nodes=5, seconds=1.0)._replace(faults=())) is None


def test_shrinking_ends_in_time_with_what_it_has() -> None:
    shortest = shrink(twice(), seconds=0.0, engine=TakesAllForNew)
    assert shortest is not None
    assert not shortest.is_done
    assert shortest.plan == twice()


def test_a_part_that_is_left_out_changes_nothing_for_the_rest() -> None:
    plan = draw(5, nodes=10, seconds=4.0)._replace(faults=())
    half = plan._replace(asks=tuple(ask for ask in plan.asks if ask.caller != 9))
    whole, part = play(plan), play(half)
    assert whole.broken == part.broken == []
    assert whole.summary["requests"] > part.summary["requests"]


def test_a_search_finds_what_breaks_and_the_shortest_plan_of_it() -> None:
    told: list[Progress] = []
    search = Search(range(30), 8, 3.0, processes=2, shrink_for=20.0, engine=TakesAllForNew)
    found = {each.rule: each for each in search.run(told.append)}
    again = found["a handler ran again for _"]
    assert search.done == told[-1].done == 30
    assert told[-1].broken >= len(again.seeds) >= 1
    assert again.shortest is not None
    assert len(again.shortest.plan.asks) + len(again.shortest.plan.faults) <= 4
    assert str(told[-1]).startswith("30 of 30 seeds, ")


def test_an_interrupted_search_keeps_what_it_found() -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    search = Search(range(100_000), 5, 1.0, processes=2)
    assert search.run(interrupt) == []
    assert search.is_interrupted
    assert search.done == 5


def test_plans_have_faults_of_every_kind() -> None:
    kinds = [fault.kind for seed in range(100) for fault in draw(seed, nodes=50, seconds=10.0).faults]
    assert {*kinds} == {*FAULTS}
    assert draw(1, 50, 10.0) == draw(1, 50, 10.0) != draw(2, 50, 10.0)


def test_a_plan_has_two_nodes_or_more() -> None:
    with pytest.raises(ValueError, match="nodes is 1"):
        draw(1, nodes=1)

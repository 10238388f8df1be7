"""Plans that the exploration found and shrank, each of which broke a promise once: of the core, or of the checks."""

from __future__ import annotations

import pytest

from onehop.testing.exploration import Ask, Fault, Plan, Site, play

FOUND = {
    "a server gives signs of life for a call that was given up": Plan(
        seed=2381,
        seconds=8.6,
        sites=(Site(node=0, serves="conductor", workers=1), Site(node=19)),
        asks=(
            Ask(at=5.8496, kind="call", caller=19, service="conductor", work=2.2885),
            Ask(at=5.8509, kind="call", caller=19, service="conductor", timeout=10.0, work=2.2885),
            Ask(at=5.8514, kind="call", caller=19, service="conductor", timeout=10.0, work=2.2885, monitor=0.5),
        ),
        faults=(Fault(kind="slow", at=8.641, until=13.854, nodes=(0,), amount=40.198),),
    ),
    "a handler that is slowed down outlasts the rest": Plan(
        seed=20220,
        seconds=2.0,
        sites=(Site(node=0, serves="conductor"), Site(node=1)),
        asks=(Ask(at=1.0, kind="cast", caller=1, service="conductor", work=3.0),),
        faults=(Fault(kind="slow", at=0.5, until=2.0, nodes=(0,), amount=100.0),),
    ),
    "the origin of a relayed fan-out hears of a receiver's death with its relay's other answers": Plan(
        seed=20311,
        seconds=1.8,
        sites=(*(Site(node=each) for each in (8, 43, 44, 45, 46)), Site(node=47, fanout_direct=5)),
        asks=(Ask(at=1.521, kind="fanout", caller=47, service="agent"),),
        faults=(
            Fault(kind="stop", at=1.611, until=9.955, nodes=(44,)),
            Fault(kind="crash", at=1.772, until=2.233, nodes=(8,)),
        ),
        latency=(0.001, 0.05),
    ),
    "a call is refused as full by one server, and another is not reached": Plan(
        seed=354,
        seconds=5.9,
        sites=(
            Site(node=0, serves="conductor", workers=1, room=2),
            Site(node=1, serves="conductor"),
            *(Site(node=each) for each in (5, 30, 34)),
        ),
        asks=(
            Ask(at=3.973, kind="call", caller=5, service="conductor"),
            Ask(at=4.5285, kind="call", caller=34, service="conductor"),
            Ask(at=4.8215, kind="call", caller=34, service="conductor"),
            Ask(at=4.8754, kind="call", caller=5, service="conductor", work=0.053),
            Ask(at=5.8842, kind="call", caller=34, service="conductor"),
            Ask(at=5.917, kind="call", caller=30, service="conductor"),
        ),
        faults=(Fault(kind="stop", at=3.234, until=11.586, nodes=(1,)),),
    ),
    "handlers that hung come to their end in a process that is stopped": Plan(
        seed=3829,
        seconds=2.8,
        sites=(Site(node=4, serves="conductor"),),
        asks=(Ask(at=1.0353, kind="call", caller=4, service="agent"),),
        faults=(
            Fault(kind="hang", at=0.165, until=8.02, nodes=(4,)),
            Fault(kind="stop", at=2.765, until=14.272, nodes=(4,)),
        ),
    ),
    "a stopped process hears what it sent to itself": Plan(
        seed=5900,
        seconds=5.6,
        sites=(Site(node=3, serves="conductor"),),
        asks=(Ask(at=4.524, kind="call", caller=3, service="conductor"),),
        faults=(
            Fault(kind="partition", at=3.813, until=11.2, nodes=(3,), others=(3,)),
            Fault(kind="stop", at=5.561, until=12.101, nodes=(3,)),
        ),
    ),
}


@pytest.mark.parametrize("plan", FOUND.values(), ids=FOUND.keys())
def test_what_broke_a_promise_once_breaks_none(plan: Plan) -> None:
    assert play(plan).broken == []

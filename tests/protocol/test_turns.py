"""Who receives next: a model of waiting threads, in which every interleaving of their atomic steps is tried.

The steps are those of ``transport/link.py``, one attribute read or written at a time, except what it does under the
socket's lock, which is one step here as it is there. Whom a leaver wakes is decided by the real :func:`successor`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from onehop.protocol.turns import successor

# A leaver's successor ----------------------------------------------------------------------------


def test_newest_of_those_who_wait_is_woken() -> None:
    assert successor({1: "first", 2: "second"}) == "second"


def test_nobody_is_woken_where_nobody_waits() -> None:
    assert successor({}) is None


class Leaving(dict[int, str]):
    """Those who wait, of whom the newest leaves between the look at them and the reading of what it waits with."""

    left = False

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())
        if not self.left:
            self.left = True
            del self[order[-1]]
        return iter(order)


def test_one_who_leaves_while_we_look_is_passed_over() -> None:
    assert successor(Leaving({1: "first", 2: "second"})) == "first"
    assert successor(Leaving({1: "only"})) is None


COME_AND_GO = """
import sys, threading, time
from onehop.protocol.turns import successor

sys.setswitchinterval(1e-6)
waiting, until = {}, time.monotonic() + 3.0

def come_and_go():
    mine = [object() for _ in range(5)]
    while time.monotonic() < until:
        for each in mine:
            waiting[each] = each
        for each in mine:
            del waiting[each]

def look():
    while time.monotonic() < until:
        successor(waiting)

threads = [threading.Thread(target=each) for each in (come_and_go, come_and_go, come_and_go, come_and_go, look, look)]
for each in threads:
    each.start()
for each in threads:
    each.join()
print("well")
"""


def test_those_who_come_and_go_while_we_look_do_no_harm() -> None:
    ended = subprocess.run([sys.executable, "-c", COME_AND_GO], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "well\n", "")


# The model ----------------------------------------------------------------------------------------


class Thread(NamedTuple):
    at: int = 0
    """Which line of its program is next."""
    arrived: bool = False
    """Its reply is in the socket, or was."""
    taken: bool = False
    """Its reply was taken from there."""
    outcome: bool = False
    noted: bool = False
    """It has said where it sleeps."""
    woken: bool = False
    gave_up: bool = False
    moved: tuple[int, ...] = ()
    """Whom it still has to wake."""


class State(NamedTuple):
    threads: tuple[Thread, ...]
    waiting: tuple[int, ...] = ()
    lead: int | None = None
    leader: int | None = None
    edge: bool = False
    """The socket's descriptor is readable."""
    wake: bool = False


Line = Callable[[State, int], list[tuple[State, bool]]]
"""One atomic step: the states it may lead to (none: it waits), each with whether it may be counted on."""


def change(state: State, who: int, to: int | None = None, **changes: Any) -> State:
    """``state`` with some fields of one thread changed, and that thread at its next line (or at ``to``)."""
    threads = list(state.threads)
    me = threads[who]
    threads[who] = me._replace(at=me.at + 1 if to is None else to, **changes)
    return state._replace(threads=tuple(threads))


def program(text: str, lines: dict[str, Callable[..., Line]]) -> tuple[Line, ...]:
    """The lines of a program: ``label: step target``; a label may be jumped to, ``end`` is behind the last line."""
    labels, found = {"end": 0}, []
    for row in text.strip().splitlines():
        label, _, step = row.rpartition(":")
        if label.strip():
            labels[label.strip()] = len(found)
        found.append(step.split())
    labels["end"] = len(found)
    return tuple(lines[name](*(labels[target] for target in targets)) for name, *targets in found)


def register() -> Line:
    def line(state: State, who: int) -> list[tuple[State, bool]]:
        waiting = state.waiting if who in state.waiting else (*state.waiting, who)
        return [(change(state._replace(waiting=waiting), who), True)]

    return line


def unregister() -> Line:
    def line(state: State, who: int) -> list[tuple[State, bool]]:
        return [(change(state._replace(waiting=tuple(each for each in state.waiting if each != who)), who), True)]

    return line


def go_if_news(target: int) -> Line:
    return lambda state, who: [(change(state, who, target if state.threads[who].outcome else None), True)]


def go_if_gave_up(target: int) -> Line:
    return lambda state, who: [(change(state, who, target if state.threads[who].gave_up else None), True)]


def go(target: int) -> Line:
    return lambda state, who: [(change(state, who, target), True)]


def lead_or_go(target: int) -> Line:
    def line(state: State, who: int) -> list[tuple[State, bool]]:
        if state.lead is not None:
            return [(change(state, who, target), True)]
        return [(change(state._replace(lead=who), who), True)]

    return line


def release() -> Line:
    return lambda state, who: [(change(state._replace(lead=None), who), True)]


def release_and_go(again: int, gave_up: int) -> Line:
    def line(state: State, who: int) -> list[tuple[State, bool]]:
        return [(change(state._replace(lead=None), who, gave_up if state.threads[who].gave_up else again), True)]

    return line


def announce() -> Line:
    return lambda state, who: [(change(state._replace(leader=who), who), True)]


def hide() -> Line:
    return lambda state, who: [(change(state._replace(leader=None), who), True)]


def note() -> Line:
    return lambda state, who: [(change(state, who, noted=True), True)]


def take(state: State, who: int, set_outcomes: bool) -> State:
    """Under the socket's lock: read everything that came."""
    came = [each for each, other in enumerate(state.threads) if other.arrived and not other.taken]
    state = state._replace(edge=False)
    for each in came:
        state = change(state, each, state.threads[each].at, taken=True, outcome=set_outcomes or each == who)
    return change(state, who, moved=tuple(each for each in came if each != who))


def drain() -> Line:
    """Read what came and set its outcomes, under the lock."""
    return lambda state, who: [(take(state, who, True), True)]


def drain_only() -> Line:
    """Broken: the outcomes are set later."""
    return lambda state, who: [(take(state, who, False), True)]


def woken(state: State, whom: int) -> State:
    """``_complete`` for one call: read ``leader``, wake it through the descriptor, or who sleeps by its lock."""
    if state.leader == whom:
        return state._replace(wake=True)
    if state.threads[whom].noted:
        return change(state, whom, state.threads[whom].at, woken=True)
    return state


def complete() -> Line:
    """Wake whose outcome was set, one at a time."""

    def line(state: State, who: int) -> list[tuple[State, bool]]:
        me = state.threads[who]
        if len(me.moved) > 1:
            return [(change(woken(state, me.moved[0]), who, me.at, moved=me.moved[1:]), True)]
        return [(change(woken(state, me.moved[0]) if me.moved else state, who, moved=()), True)]

    return line


def wake_next_or_go(target: int) -> Line:
    def line(state: State, who: int) -> list[tuple[State, bool]]:
        me = state.threads[who]
        return [(change(woken(state, me.moved[0]), who), True)] if me.moved else [(change(state, who, target), True)]

    return line


def set_next_and_go(target: int) -> Line:
    def line(state: State, who: int) -> list[tuple[State, bool]]:
        first, *rest = state.threads[who].moved
        state = change(state, first, state.threads[first].at, outcome=True)
        return [(change(state, who, target, moved=tuple(rest)), True)]

    return line


def poll_or_go(again: int, gave_up: int) -> Line:
    def line(state: State, who: int) -> list[tuple[State, bool]]:
        timeout = change(state, who, gave_up, gave_up=True), False
        return (
            [(change(state._replace(wake=False), who, again), True), timeout] if state.edge or state.wake else [timeout]
        )

    return line


def sleep_or_go(again: int, gave_up: int) -> Line:
    def line(state: State, who: int) -> list[tuple[State, bool]]:
        timeout = change(state, who, gave_up, gave_up=True), False
        return [(change(state, who, again, woken=False), True), timeout] if state.threads[who].woken else [timeout]

    return line


def go_if_nobody_waits(target: int) -> Line:
    return lambda state, who: [(change(state, who, None if state.waiting else target), True)]


def go_if_led(target: int) -> Line:
    return lambda state, who: [(change(state, who, None if state.lead is None else target), True)]


def choose_or_go(target: int) -> Line:
    def line(state: State, who: int) -> list[tuple[State, bool]]:
        chosen = successor({each: each for each in state.waiting})
        if chosen is None:
            return [(change(state, who, target), True)]
        return [(change(state, who, moved=(chosen,)), True)]

    return line


def wake_chosen() -> Line:
    def line(state: State, who: int) -> list[tuple[State, bool]]:
        [chosen] = state.threads[who].moved
        return [(change(change(state, chosen, state.threads[chosen].at, woken=True), who, moved=()), True)]

    return line


LINES: dict[str, Callable[..., Line]] = {
    each.__name__: each
    for each in (
        register, unregister, go_if_news, go, lead_or_go, release, release_and_go, announce, hide, note, drain,
        drain_only, complete, wake_next_or_go, set_next_and_go, poll_or_go, sleep_or_go, go_if_gave_up,
        go_if_nobody_waits, go_if_led, choose_or_go, wake_chosen,
    )
}  # fmt: skip

CALLER = """
          : register
    again : go_if_news leave
          : lead_or_go beside
          : announce
    drain : drain
          : complete
          : go_if_news stop
          : poll_or_go drain stop
    stop  : hide
          : release_and_go again leave
    beside: note
          : go_if_news again
          : sleep_or_go again leave
    leave : unregister
          : go_if_nobody_waits end
          : go_if_led end
          : choose_or_go end
          : wake_chosen
"""
# Somebody who sends, and so drains for all; and who looks after links on which nobody waits.
SENDER = """
          : drain
          : complete
"""
KEEPER = """
          : lead_or_go end
          : drain
          : complete
          : release
          : go_if_nobody_waits end
          : go_if_led end
          : choose_or_go end
          : wake_chosen
"""


RULES: dict[str, list[tuple[str, str]]] = {
    "a newcomer registers, then tries to lead": [
        ("          : register\n", ""),
        ("    beside: note", "    beside: register\n          : note"),
    ],
    "a leaver gives the lead back, then looks who waits": [
        ("          : release_and_go again leave\n    beside", "          : go early\n    beside"),
        (
            "    leave : unregister",
            """    early : unregister
          : go_if_nobody_waits last
          : choose_or_go last
          : release
          : wake_chosen
          : go end
    last  : release_and_go end end
    leave : unregister""",
        ),
    ],
    "who gives up hands on too": [("    leave : unregister", "    leave : unregister\n          : go_if_gave_up end")],
    "a leader announces itself, then looks at its outcome": [
        ("          : announce\n", ""),
        ("          : poll_or_go", "          : announce\n          : poll_or_go"),
    ],
    "a sleeper says where it sleeps, then looks at its outcome": [
        ("    beside: note\n          : go_if_news again", "    beside: go_if_news again\n          : note")
    ],
    "an outcome is set before anybody is woken": [
        (
            "    drain : drain\n          : complete\n",
            """    drain : drain_only
    each  : wake_next_or_go ready
          : set_next_and_go each
    ready : go look
""",
        ),
        ("          : go_if_news stop", "    look  : go_if_news stop"),
    ],
}


def without(rule: str) -> str:
    """A caller that breaks one rule: two of its lines change places, or one is left out."""
    text = CALLER
    for old, new in RULES[rule]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


class Found(NamedTuple):
    wrong: State | None
    """A state that must not be, if there is one."""
    looked_at: int


def search(callers: int, caller: str = CALLER, others: tuple[str, ...] = (), patient: int = 0) -> Found:
    """Look at every state that can be reached, for one in which somebody is forgotten.

    Forgotten are all, if nobody can take a step but by giving up, or if somebody waits while nobody leads and nobody
    is awake; and one who sleeps, or leads and polls, although it has its outcome and nobody is about to wake it.

    Args:
        callers, caller: how many, and their program.
        others: the programs of other threads.
        patient: how many of the callers never give up.
    """
    programs = [program(caller, LINES)] * callers + [program(text, LINES) for text in others]
    ends = [len(each) for each in programs]
    asleep, polling = (
        next(at for at, line in enumerate(programs[0]) if line.__qualname__.startswith(name))
        for name in ("sleep", "poll")
    )
    looking = [
        {at for at, line in enumerate(lines) if line.__qualname__.startswith(("drain", "poll"))} for lines in programs
    ]
    news, completing = (
        [{at for at, line in enumerate(lines) if line.__qualname__.startswith(name)} for lines in programs]
        for name in ("go_if_news", "complete")
    )

    def is_private(who: int, me: Thread) -> bool:
        """Whether the next step means the same before and after any step of others, so that it may be taken at once."""
        return (me.outcome and me.at in news[who]) or (not me.moved and me.at in completing[who])

    through = [Thread(at=end, arrived=True, taken=True) for end in ends]
    start = State((Thread(),) * len(programs))
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        moving, awake = False, state.lead is not None
        somebody_looks = any(
            me.at < end and me.at in looking[who] for who, (me, end) in enumerate(zip(state.threads, ends, strict=True))
        )
        to_be_woken = {each for me in state.threads for each in me.moved}
        private = next((who for who, me in enumerate(state.threads) if is_private(who, me)), None)
        for who, me in enumerate(state.threads):
            if me.at == ends[who]:
                continue
            forgotten = (me.at == asleep and not me.woken) or (me.at == polling and not state.wake and not state.edge)
            if forgotten and who < callers and me.outcome and who not in to_be_woken:
                return Found(state, len(seen))
            awake |= me.at > 0 and not (who < callers and me.at == asleep and not me.woken)
            if private is not None and private != who:
                continue
            following = programs[who][me.at](state, who)
            if who < callers and me.at > 0 and not me.arrived and somebody_looks and private is None:
                # The network: a reply, at any time after the request. Only who reads or polls can tell the time, so it
                # is enough to let it come when somebody is about to.
                following.append((change(state._replace(edge=True), who, me.at, arrived=True), True))
            for after, counts in following:
                moving |= counts
                if not counts and sum(each.gave_up for each in after.threads) + patient > callers:
                    continue
                if any(
                    each.at == end and each != gone
                    for each, end, gone in zip(after.threads, ends, through, strict=True)
                ):
                    # What a thread knew that is through does not matter any more.
                    after = after._replace(
                        threads=tuple(
                            gone._replace(gave_up=each.gave_up and patient > 0) if each.at == end else each
                            for each, end, gone in zip(after.threads, ends, through, strict=True)
                        )
                    )
                after = canonical(after, callers)
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
        done = all(me.at == end for me, end in zip(state.threads, ends, strict=True))
        if (not moving and not done) or (not awake and state.waiting):
            return Found(state, len(seen))
    return Found(None, len(seen))


def canonical(state: State, callers: int) -> State:
    """Callers are alike: of the states that differ only in who is who, one."""
    waiting = state.waiting
    keys = [
        (waiting.index(who) if who in waiting else len(waiting), state.threads[who][:7], who == state.lead, who)
        for who in range(callers)
    ]
    order = [key[-1] for key in sorted(keys)]
    if order == list(range(callers)):
        return state
    new = {old: at for at, old in enumerate(order)} | {who: who for who in range(callers, len(state.threads))}
    threads = [state.threads[old] for old in order] + list(state.threads[callers:])
    return State(
        tuple(me._replace(moved=tuple(new[each] for each in me.moved)) if me.moved else me for me in threads),
        tuple(new[each] for each in waiting),
        None if state.lead is None else new[state.lead],
        None if state.leader is None else new[state.leader],
        state.edge,
        state.wake,
    )


@pytest.mark.parametrize(
    ("callers", "others", "patient"),
    [(2, (), 0), (2, (SENDER,), 0), (2, (SENDER, KEEPER), 0), (3, (), 0), (3, (SENDER,), 3), (4, (), 4)],
    ids=[
        "two callers",
        "two callers and one who sends",
        "two callers, one who sends and the housekeeping",
        "three callers",
        "three callers who never give up and one who sends",
        "four callers who never give up",
    ],
)
def test_nobody_is_forgotten_in_any_interleaving(callers: int, others: tuple[str, ...], patient: int) -> None:
    found = search(callers, CALLER, others, patient)
    assert found.wrong is None
    assert found.looked_at > 1_000, "the model did not move"


@pytest.mark.parametrize("rule", RULES)
def test_without_a_rule_somebody_is_forgotten(rule: str) -> None:
    assert search(2, without(rule), (SENDER,)).wrong is not None

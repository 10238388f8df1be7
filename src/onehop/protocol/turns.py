"""Who among waiting threads receives next.

Threads that wait for something from one socket share the work: one of them, the *leader*, reads the socket and
hands over what belongs to others; the rest sleep. This file holds the policy; the locks are the engine's
(``transport/blocking.py``), and a model in ``tests/protocol/test_turns.py`` tries every interleaving.

The rules:

1. A newcomer registers what it waits for, **then** tries to lead.
2. A leader that has what it waited for leaves: it gives the lead back, **then** looks whether anyone still waits,
   and wakes one of them (:func:`successor`), who begins at rule 1. Whoever leaves for another reason (a timeout, an
   exception) does the same.
3. Who is woken and finds neither its answer nor the lead free sleeps again: somebody leads, or is leaving and will
   look.

So at no time does somebody wait while nobody leads and nobody is awake: the newcomer of rule 1 and the leaver of
rule 2 do their two steps in opposite order, hence at least one of them sees the other.
"""

from __future__ import annotations

from typing import TypeVar

Key = TypeVar("Key")
Waiting = TypeVar("Waiting")


def successor(waiting: dict[Key, Waiting]) -> Waiting | None:
    """Whom a leaver wakes: the newest of those who wait, or None.

    The newest was running a moment ago, so its stack and its data are still in the cache. Measured, first-come
    order is no better, and the lead changes hands once in thirty calls only.
    """
    # A list of them is made in one step of the interpreter. An iterator's next step is another one: where the dict was
    # made anew between the two, CPython's reversed() reads what lies behind its entries, and the process crashes.
    while keys := list(waiting):
        try:
            return waiting[keys[-1]]
        except KeyError:
            continue  # it left while we looked
    return None

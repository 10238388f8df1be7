"""Each invariant can fail: worlds that are broken on purpose, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from onehop.errors import NoRoute
from onehop.protocol import wire
from onehop.protocol.calls import room_for
from onehop.protocol.inbox import NEW, Request, Window
from onehop.testing.engine import EngineLink, VirtualEngine
from onehop.testing.invariants import InvariantBroken
from onehop.testing.offer import Offer, Target
from onehop.testing.simulation import World


class AnswersTwice(VirtualEngine):
    """Its second answer goes to the request after."""

    def reply(self, request: Request, frame: wire.Frame) -> None:
        super().reply(request, frame)
        assert isinstance(frame, bytes)
        stray = wire.answer(wire.REPLY, 0, request.id + 1, frame[wire.HEADER_SIZE :])
        self._send_one(request.identity, stray)


class AnswersForAnother(VirtualEngine):
    """Says in its replies that another node ran the request."""

    def reply(self, request: Request, frame: wire.Frame) -> None:
        assert isinstance(frame, bytes)
        super().reply(request, frame[:-16] + b"somebody else  .")


class Repeats(Window):
    def take(self, number: int) -> str:
        super().take(number)
        return NEW


class WithoutWindow(VirtualEngine):
    """Takes every request for a new one."""

    def _take(self, identity: bytes, frame: bytes, body: bytes | None) -> None:
        for sender in self.protocol.inbox.senders.values():
            sender.window = Repeats(4096)
        super()._take(identity, frame, body)


class WithoutRoom(VirtualEngine):
    """Takes in more than its inbox is meant to."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.protocol.inbox.messages = 1 << 20


class RunsWhatExpired(VirtualEngine):
    def expired(self, request: Request) -> bool:
        return False


class GivesMoreTime(VirtualEngine):
    """Takes the remaining time of a request for twice as long."""

    def _take(self, identity: bytes, frame: bytes, body: bytes | None) -> None:
        kind, flags, extent, number, id = wire.header(frame)
        if kind == wire.REQUEST:
            frame = wire.pack(kind, flags, extent, 2 * number, id) + frame[wire.HEADER_SIZE :]
        super()._take(identity, frame, body)


class NeverGivesUp(VirtualEngine):
    def _exchange(self, entry: Any, task: Any, route: Any, link: Any) -> Any:
        yield float("inf")


class EndsTwice(VirtualEngine):
    def finish(self, entry: Any, outcome: str, error: Any = None) -> None:
        super().finish(entry, outcome, error)
        super().finish(entry, outcome, error)


class RunsAndRefuses(VirtualEngine):
    """Says that it did not run what it has run."""

    def reply(self, request: Request, frame: wire.Frame) -> None:
        super().reply(request, wire.reject(request.id, "full"))


class RefusesAndRuns(VirtualEngine):
    """Runs what it said it would not run."""

    def _work(self, target: Target) -> None:
        for request in list(target.tasks):
            self._send_one(request.identity, wire.reject(request.id, "full"))
            self.clock.after(0.1, lambda _, request=request: self.invariants.ran(self, request))
        target.tasks.clear()


class KeepsWhatItAnswered(VirtualEngine):
    def _answer(self, request: Request, frame: wire.Frame) -> None:
        self._send_one(request.identity, frame)


class KeepsOldRoutes(VirtualEngine):
    """Forgets that a lost peer is no route."""

    def lost(self, link: EngineLink, why: str, linger: float = 0.0, **details: Any) -> None:
        before = self.protocol.routes
        super().lost(link, why, linger, **details)
        self.protocol.routes = before


class LosesPeers(VirtualEngine):
    """Gives up a connection with which nothing is wrong, and what was sent over it."""

    def start(self) -> None:
        super().start()
        self.clock.after(1.05, self._forget)

    def _resume(self, *_: Any) -> Any:
        yield from ()

    def _forget(self, _: None) -> None:
        for link in list(self.links.values()):
            self.lost(link, "no reason")


class RefusesWithoutReason(VirtualEngine):
    def _work(self, target: Target) -> None:
        for request in target.tasks:
            self._answer(request, wire.reject(request.id, "draining"))
        target.tasks.clear()


class Swallows(VirtualEngine):
    """Runs a request and sends no answer."""

    def reply(self, request: Request, frame: wire.Frame) -> None:
        self.protocol.inbox.finish(request)


class Despairs(VirtualEngine):
    """Asks nobody."""

    def _request(self, entry: Any, task: Any) -> Any:
        self.finish(entry, "error", NoRoute("nobody"))
        yield 0.0


class Overlooks(VirtualEngine):
    """Leaves somebody out of its fan-outs."""

    def start(self) -> None:
        super().start()
        everybody = self.protocol.receivers
        self.protocol.receivers = lambda *of: everybody(*of)[1:]  # type: ignore[method-assign]


class HearsOfNoEnd(VirtualEngine):
    def lost(self, *arguments: Any, **options: Any) -> None:
        """Nothing."""

    def plan(self, time: float) -> None:
        """Nor does it ask whether anybody lives."""


class LosesCasts(VirtualEngine):
    """Takes casts in and does not run them."""

    def _work(self, target: Target) -> None:
        for request in target.tasks:
            self._answer(request, b"")
        target.tasks.clear()


class PassesOver(VirtualEngine):
    def expired(self, request: Request) -> bool:
        return True


class Exchanges(VirtualEngine):
    """Has one server's requests run by another."""

    def start(self) -> None:
        super().start()
        first, second = self.targets
        self.protocol.inbox.withdraw("echo", "first", first)
        self.protocol.inbox.offer("echo", "first", second)


class Chatters(VirtualEngine):
    """Asks every server it knows for a sign of life, every second."""

    def start(self) -> None:
        super().start()
        self._chatter()

    def _chatter(self, _: None = None) -> None:
        for link in self.links.values():
            link.post(None, wire.pack(wire.PING))
        self.clock.after(0.1, self._chatter)


def load(world: World, engine: type[VirtualEngine], **options: Any) -> None:
    """One node of the broken kind, called by whole ones and calling them; for some seconds, and then at rest."""
    broken = world.nodes(1, service="echo", engine=engine, **options)[0]
    whole = world.nodes(3, service="echo")
    world.call_randomly(rate=40, service="echo", callers=whole, work=0.05)
    world.call_randomly(rate=10, service="echo", callers=[broken], timeout=1.0)
    world.run(until=4.0)
    world.settle()


def stray(world: World) -> None:
    world.nodes(1, service="echo", engine=AnswersTwice)
    client = world.nodes(1)[0]
    for index in range(20):
        world.call(client, "echo", at=0.1 + index / 1000, work=0.1)
    world.settle()


def twice(world: World) -> None:
    world.network.duplicates = 1.0
    load(world, WithoutWindow)


def crowded(world: World) -> None:
    world.nodes(1, service="echo", engine=WithoutRoom, room=5)
    world.call_randomly(rate=100, callers=world.nodes(3), work=1.0)
    world.run(until=2.0)


def late(engine: type[VirtualEngine]) -> Callable[[World], None]:
    def play(world: World) -> None:
        world.nodes(1, service="echo", engine=engine, workers=1)
        client = world.nodes(1)[0]
        world.call(client, "echo", at=0.1, work=1.5, timeout=3.0, ready_timeout=0.0)
        world.call(client, "echo", at=0.2, timeout=1.0, ready_timeout=0.0)
        world.settle()

    return play


def forgetful(world: World) -> None:
    client = world.nodes(1, engine=KeepsOldRoutes)[0]
    server = world.nodes(2, service="echo")[0]
    world.call_randomly(rate=50, callers=[client])
    world.crash(server, at=1.0)
    world.run(until=3.0)


def talkative(world: World) -> None:
    load(world, Chatters)
    world.run(until=60.0)
    world.invariants.messages(sum(world.network.sent.values()), world.network.opened_links, 0)


def served_by(engine: type[VirtualEngine], kind: str = "call", **options: Any) -> Callable[[World], None]:
    """A request to a broken server, with which nothing else is wrong."""

    def play(world: World) -> None:
        world.nodes(1, service="echo", engine=engine)
        client = world.nodes(1)[0]
        getattr(world, kind)(client, "echo", at=1.0, work=0.1, **options)
        world.settle()

    return play


def made_by(engine: type[VirtualEngine], kind: str = "call", **options: Any) -> Callable[[World], None]:
    """A request of a broken client, with which nothing else is wrong."""

    def play(world: World) -> None:
        world.nodes(3, service="echo")
        client = world.nodes(1, engine=engine)[0]
        getattr(world, kind)(client, "echo", at=1.0, work=0.1, **options)
        world.settle()

    return play


def unheard(power_lost: bool) -> Callable[[World], None]:
    def play(world: World) -> None:
        server, client = world.nodes(1, service="echo")[0], world.nodes(1, engine=HearsOfNoEnd)[0]
        world.call(client, "echo", at=0.5, work=10.0, timeout=30.0)
        world.crash(server, at=1.0, power_lost=power_lost)
        world.run(until=0.9 + (7.0 if power_lost else 1.0))
        world.run(until=10.0)

    return play


def exchanged(world: World) -> None:
    world.nodes(1, offers=[Offer("echo", "first"), Offer("echo", "second")], engine=Exchanges)
    world.call(world.nodes(1)[0], "echo", server="first")
    world.settle()


def crowding(world: World) -> None:
    world.nodes(1, service="echo")
    client = world.nodes(1)[0]
    for _ in range(6):
        world.call(client, "echo", work=5.0, timeout=9.0)
    world.run(until=1.0)
    next(iter(client.engine.links.values())).calls.room = room_for(2, 1 << 23)
    world.run(until=8.0)


def hoarding(world: World) -> None:
    node = world.nodes(1)[0]
    node.engine.protocol.peers._meet(b"nobody's node id")
    world.run(until=1.0)


def overfull(world: World) -> None:
    server, client = world.nodes(1, service="echo", engine=VirtualEngine)[0], world.nodes(1)[0]
    world.call(client, "echo", at=0.5, work=5.0, size=10_000)
    world.run(until=1.0)
    server.engine.protocol.inbox.size = 5_000
    server.engine.invariants.taken(server.engine, [])


@pytest.mark.parametrize(
    ("play", "breach"),
    [
        (made_by(LosesPeers), "lost node ., which nothing befell"),
        (served_by(RefusesWithoutReason), "was refused by node 0, which nothing befell: draining"),
        (served_by(Swallows, timeout=5.0), "was answered by node 0, which nothing befell, and timed out"),
        (made_by(Despairs), "ended while node . offered it, which nothing befell"),
        (made_by(Overlooks, "fanout"), "did not address node"),
        (unheard(power_lost=False), "still waits for node 0, which died 1.1 s ago"),
        (unheard(power_lost=True), "still waits for node 0, which died 7.1 s ago"),
        (served_by(LosesCasts, "cast"), "was taken in by a node that lives, and did not run"),
        (served_by(PassesOver), "passed over .* before its deadline"),
        (exchanged, "the handlers of 'second' ran"),
        (crowding, "requests under way to node .*; the window is 2"),
        (hoarding, "which has neither record nor connection"),
        (overfull, "its inbox has room for 5000"),
        (stray, "accepted the reply to request"),
        (lambda world: load(world, AnswersForAnother), "and accepted a reply of node"),
        (twice, "a handler ran again for"),
        (crowded, "its inbox has room for 5"),
        (late(RunsWhatExpired), "after its deadline"),
        (late(GivesMoreTime), "more time than its caller does"),
        (lambda world: load(world, NeverGivesUp), "has not ended 0.1 s after its deadline"),
        (lambda world: load(world, EndsTwice), "ended 2 times"),
        (late(RunsAndRefuses), "ended as not executed, and ran"),
        (late(RefusesAndRuns), "whose caller was told that none did"),
        (lambda world: load(world, KeepsWhatItAnswered), "taken in and not finished"),
        (forgetful, "chose a route to a peer"),
        (talkative, "messages for"),
    ],
)
def test_a_broken_world_is_found_out(world: World, play: Callable[[World], None], breach: str) -> None:
    with pytest.raises(InvariantBroken, match=breach):
        play(world)


def test_a_breach_tells_seed_time_and_the_last_steps(world: World) -> None:
    with pytest.raises(InvariantBroken) as caught:
        stray(world)
    first, *steps = str(caught.value).splitlines()
    assert f"seed {world.seed}, at {world.now:.6f} s" in first
    assert 20 < len(steps) <= 50
    assert "takes in REPLY" in steps[-1]


def test_a_breach_in_a_lenient_world_is_kept_and_time_goes_on() -> None:
    world = World(3, is_strict=False)
    load(world, EndsTwice)
    assert world.now > 4.0
    assert len(world.invariants.broken) > 10


def test_views_that_do_not_agree_are_seen(world: World) -> None:
    nodes = world.nodes(3, service="echo")
    assert world.views_agree(within=0.0)
    world.registry_away()
    world.crash(nodes[0])
    assert not world.views_agree(within=5.0)
    world.repair()
    assert world.views_agree(within=0.5)

"""Fan-outs through relays, in worlds of many nodes and of many faults."""

from __future__ import annotations

import resource
import time
from collections import Counter
from typing import Any

import pytest

from onehop.protocol import tree, wire
from onehop.protocol.inbox import Request
from onehop.testing.engine import VirtualEngine
from onehop.testing.invariants import Entry, InvariantBroken
from onehop.testing.simulation import VirtualNode, World
from onehop.testing.tree import VirtualTree


def crowd(world: World, number: int, **options: Any) -> list[VirtualNode]:
    """Receivers that know nobody: a relay is told of whom to send to."""
    return world.nodes(number, service="echo", watches=False, **options)


def origin(world: World, direct: int = 10) -> VirtualNode:
    """Who fans out, and sends to at most ``direct`` without relays."""
    node: VirtualNode = world.nodes(1, fanout_direct=direct)[0]
    return node


def outcomes(entry: Entry) -> dict[str | None, int]:
    return dict(Counter(part.outcome for part in entry.parts))


def is_honest(entry: Entry) -> bool:
    """Whether each part has one receipt, and ran as it says."""
    return all(
        part.finished_once and part.times_run <= 1 and (part.executed != "no" or part.times_run == 0)
        and (part.outcome != "taken" or part.times_run == 1)
        for part in entry.parts
    )  # fmt: skip


def opened_by(world: World, node: VirtualNode) -> int:
    return len(node.engine.links)


@pytest.mark.timeout(600)
def test_a_fan_out_to_ten_thousand(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()  # a busy machine takes longer, and the simulation no more of it
    world = World(seed=1)
    servers = crowd(world, 10_000)
    caller = origin(world, 2_000)
    ready = time.process_time()
    first = world.fanout(caller, "echo", at=0.1, timeout=10.0)
    second = world.fanout(caller, "echo", at=5.0, timeout=10.0)
    world.settle()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    lasted = [max(part.finished_at - part.started for part in each.parts) for each in (first, second)]
    of_each = [len(server.engine.links) for server in servers]
    with capsys.disabled():
        print(
            f"\n10,000 receivers: {lasted[0]:.3f} s until all receipts, {lasted[1]:.3f} s over links that stand; the "
            f"origin has {opened_by(world, caller)} links, a relay {max(of_each)} at most; {ready - began:.1f} s to "
            f"make the world, {time.process_time() - ready:.1f} s to run it, {memory:.0f} MiB"
        )
    assert outcomes(first) == outcomes(second) == {"taken": 10_000}
    assert all(map(is_honest, (first, second)))
    assert opened_by(world, caller) <= 150
    assert max(of_each) <= 150
    assert sum(map(bool, of_each)) == opened_by(world, caller)
    assert time.process_time() - began < 60.0
    assert memory < 2_048


def test_a_fan_out_to_few_goes_to_each_directly(world: World) -> None:
    crowd(world, 20)
    direct, through = origin(world, 20), origin(world, 19)
    for caller in (direct, through):
        assert outcomes(world.fanout(caller, "echo", at=None)) == {None: 20}
    world.settle()
    assert opened_by(world, direct) == 20
    assert opened_by(world, through) <= 8


def test_relays_that_are_killed_in_the_middle_leave_receipts_that_say_unknown(world: World) -> None:
    servers, caller = crowd(world, 400), origin(world)
    world.fanout(caller, "echo", at=0.1)
    world.run(until=2.0)
    relays = [server for server in servers if server.engine.links]
    killed = relays[::2]
    lasting = world.fanout(caller, "echo", at=2.0, timeout=5.0)
    # Their requests have come in, and what they pass on is under way.
    world.clock.at(2.0, lambda _: kill_when_asked(world, killed))
    world.settle()
    told = outcomes(lasting)
    assert told["PeerLost"] >= len(killed)
    assert told["taken"] + told["PeerLost"] == 400
    assert is_honest(lasting)
    lost = [part for part in lasting.parts if part.outcome == "PeerLost"]
    assert {part.executed for part in lost} == {"unknown"}
    assert any(part.times_run for part in lost)
    assert any("relay was lost" in str(part.error) for part in lost)


def kill_when_asked(world: World, nodes: list[VirtualNode]) -> None:
    for node in nodes:
        if not node.engine.dead and node.engine.tree.under_way:
            world.crash(node)
    if not all(node.engine.dead for node in nodes):
        world.clock.after(0.0001, lambda _: kill_when_asked(world, nodes))


def test_what_a_relay_cannot_reach_the_origin_sends(world: World) -> None:
    servers, caller = crowd(world, 100), origin(world)
    world.fanout(caller, "echo", at=0.1)
    world.run(until=2.0)
    relay = next(server for server in servers if server.engine.links)
    others = [server for server in servers if server is not relay]
    world.partition([relay], others, at=2.0)
    world.run(until=10.0)
    assert not relay.engine.links
    entry = world.fanout(caller, "echo", at=10.0, timeout=20.0)
    world.settle()
    assert outcomes(entry) == {"taken": 100}
    assert is_honest(entry)
    assert opened_by(world, caller) > 12


def test_a_lost_relay_is_replaced_before_it_is_asked(world: World) -> None:
    servers, caller = crowd(world, 100), origin(world)
    world.fanout(caller, "echo", at=0.1)
    world.run(until=2.0)
    relay = next(server for server in servers if server.engine.links)
    world.partition([relay], [caller], at=2.0)
    world.run(until=10.0)
    entry = world.fanout(caller, "echo", at=10.0, timeout=4.0)
    world.settle()
    told = {part.server: part.outcome for part in entry.parts}
    assert told.pop(f"server-{relay.index}", None) in {None, "taken"}  # by another relay, which reaches it
    assert set(told.values()) == {"taken"}
    assert is_honest(entry)


def test_relays_that_cannot_be_reached_cost_a_moment(world: World) -> None:
    servers, caller = crowd(world, 100), origin(world)
    cut = servers[::4]
    world.partition(cut, [caller], at=0.0)
    entry = world.fanout(caller, "echo", at=0.1, timeout=8.0)
    world.settle()
    told = {part.server: part for part in entry.parts}
    alone = [told.pop(f"server-{server.index}") for server in cut]
    assert {part.outcome for part in told.values()} == {"taken"}
    lasted = max(part.finished_at - part.started for part in told.values())
    assert 1.0 <= lasted < 1.2
    assert {part.outcome for part in alone} <= {"taken", "CallTimeout", "PeerLost"}
    assert sum(part.outcome == "taken" for part in alone) > 5  # by relays that are not cut off from them
    assert is_honest(entry)


def test_a_partition_between_the_origin_and_a_relay_that_was_asked_leaves_it_unknown(world: World) -> None:
    servers, caller = crowd(world, 100), origin(world)
    world.fanout(caller, "echo", at=0.1)
    world.run(until=2.0)
    relay = next(server for server in servers if server.engine.links)
    chunk = len(relay.engine.links)
    world.partition([relay], [caller], at=2.0, repair_at=30.0)
    entry = world.fanout(caller, "echo", at=2.1, timeout=3.0)
    world.settle()
    told = outcomes(entry)
    assert told.get("taken", 0) == 100 - chunk - 1
    assert told.get("PeerLost", 0) + told.get("CallTimeout", 0) == chunk + 1
    assert is_honest(entry)


def test_unwilling_nodes_pass_nothing_on(world: World) -> None:
    willing, unwilling = crowd(world, 30), crowd(world, 270, relay=False)
    caller = origin(world)
    entry = world.fanout(caller, "echo", at=0.1)
    world.settle()
    assert outcomes(entry) == {"taken": 300}
    assert not any(server.engine.links for server in unwilling)
    assert 5 <= sum(bool(server.engine.links) for server in willing) <= 30


def test_where_nobody_is_willing_it_goes_to_each_directly(world: World) -> None:
    crowd(world, 50, relay=False)
    caller = origin(world)
    entry = world.fanout(caller, "echo", at=0.1)
    world.settle()
    assert (outcomes(entry), opened_by(world, caller)) == ({"taken": 50}, 50)


class OfAnOlderRelease(VirtualEngine):
    """Announces that it is willing, and has no such service."""

    def start(self) -> None:
        super().start()
        self.protocol.inbox.withdraw(tree.SERVICE, "", self.tree)


def test_relays_that_refuse_are_passed_by(world: World) -> None:
    crowd(world, 50, engine=OfAnOlderRelease)
    draining, full = crowd(world, 25), crowd(world, 25)
    for node in full:
        node.engine.tree.under_way = 8
    for node in draining:
        world.clock.at(0.1, lambda _, node=node: node.engine.protocol.inbox.drain("draining"))
    caller = origin(world)
    entry = world.fanout(caller, "echo", at=0.1 + 1e-9)
    world.run(until=2.0)
    for node in full:
        node.engine.tree.under_way = 0
    world.settle()
    assert outcomes(entry) == {"taken": 75, "PeerLost": 25}  # who drains answers no hello
    assert is_honest(entry)


def test_receivers_that_refuse_or_hang_have_the_receipts_of_the_direct_form(world: World) -> None:
    crowd(world, 40)
    full, hanging = crowd(world, 5, room=1, workers=1), crowd(world, 5, relay=False)
    caller, direct = origin(world), origin(world, 1_000)
    for node in full:
        world.call(direct, "echo", server=f"server-{node.index}", at=0.1, work=60.0, timeout=80.0)
    world.run(until=1.0)
    world.hold(hanging, [node for node in world.up() if node not in hanging], at=1.0, release_at=20.0)
    entries = [world.fanout(each, "echo", at=2.0, timeout=3.0) for each in (caller, direct)]
    world.settle()
    for entry in entries:
        told = {part.server: part.outcome for part in entry.parts}
        assert {told[f"server-{node.index}"] for node in full} == {"Rejected"}
        assert {told[f"server-{node.index}"] for node in hanging} <= {"CallTimeout", "PeerLost"}
        assert outcomes(entry)["taken"] == 40
        assert is_honest(entry)


@pytest.mark.parametrize("seed", range(4))
def test_no_fault_makes_a_copy_run_twice_or_a_receipt_lie(seed: int) -> None:
    world = World(seed)
    servers = world.nodes(40, service="echo", fanout_direct=5) + crowd(world, 40, fanout_direct=5)
    world.call_randomly(rate=4, service="echo", kind="fanout", timeout=3.0, callers=servers[:40])
    for moment in range(1, 16):
        some = world.random.sample(servers, world.random.randint(1, 15))
        rest = [node for node in servers if node not in some]
        at, later = moment + world.random.random(), moment + 1 + 4 * world.random.random()
        kind = world.random.choice(("crash", "drain", "partition", "one way", "hold", "power"))
        if kind in ("partition", "one way"):
            world.partition(some, rest, at=at, repair_at=later, one_way=kind == "one way")
        elif kind == "hold":
            world.hold(some[:5], rest, at=at, release_at=later)
        else:
            for node in some[:5]:
                if kind == "drain":
                    world.drain(node, at=at)
                else:
                    world.crash(node, at=at, power_lost=kind == "power")
                world.restart(node, at=later + 1.0)
    world.network.duplicates = 0.05
    world.run(until=22.0)
    world.repair()
    world.settle()
    parts = [part for entry in world.ledger for part in entry.parts]
    assert len(parts) > 2_000
    assert Counter(part.outcome for part in parts)["taken"] > len(parts) / 2
    assert all(part.times_run <= 1 for part in parts)


# What the checks say of a relay that is wrong ------------------------------------------------------


class Liar(VirtualTree):
    """Says that all took it, and sends nothing."""

    def serve(self, request: Request) -> None:
        receivers = tree.parse_request(request.body)[2]
        answer = tree.receipts([tree.Receipt(tree.TAKEN, 0.0)] * len(receivers))
        self._engine.reply(request, wire.answer(wire.REPLY, 0, request.id, answer))


class Forgetful(VirtualTree):
    """Passes it on, and says that it did not."""

    def serve(self, request: Request) -> None:
        super().serve(request)
        receivers = tree.parse_request(request.body)[2]
        answer = tree.receipts([tree.Receipt(tree.NOT_SENT, 0.0)] * len(receivers))
        self._engine.reply(request, wire.answer(wire.REPLY, 0, request.id, answer))


@pytest.mark.parametrize(("kind", "what"), [(Liar, "nobody took it in"), (Forgetful, "a handler ran again")])
def test_a_relay_that_lies_is_found_out(kind: type[VirtualTree], what: str) -> None:
    class Wrong(VirtualEngine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.tree = kind(self)

    world = World(3)
    crowd(world, 50, engine=Wrong)
    world.fanout(origin(world), "echo", at=0.1)
    with pytest.raises(InvariantBroken, match=what):
        world.settle()

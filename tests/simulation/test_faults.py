"""What may befall one node or its connections, and what is seen of it."""

from __future__ import annotations

import pytest

from onehop.testing.exploration import Ask, Fault, Plan, Site, play
from onehop.testing.offer import Offer
from onehop.testing.simulation import VirtualNode, World


def pair(world: World) -> tuple[VirtualNode, VirtualNode]:
    """A server and its client, who have met."""
    server, client = world.nodes(1, service="echo")[0], world.nodes(1)[0]
    world.call(client, "echo", at=0.1)
    world.run(until=1.0)
    return server, client


def test_a_process_that_is_stopped_for_a_moment_answers_late(world: World) -> None:
    server, client = pair(world)
    world.stop(server, resume_at=3.0)
    call = world.call(client, "echo", at=1.5, timeout=5.0, work=0.0)
    world.settle()
    assert call.outcome == "replied"
    assert call.finished_at is not None
    assert 3.0 < call.finished_at < 3.1


def test_a_stopped_process_loses_its_callers_and_gets_them_back(world: World) -> None:
    server, client = pair(world)
    world.stop(server, resume_at=12.0)
    call = world.call(client, "echo", at=1.5, timeout=30.0)
    world.run(until=9.0)
    assert (call.outcome, call.executed) == ("PeerLost", "unknown")
    world.run(until=24.0)
    again = world.call(client, "echo")
    world.settle()
    assert again.outcome == "replied"


def test_a_caller_that_is_stopped_hears_of_its_calls_when_it_goes_on(world: World) -> None:
    _, client = pair(world)
    call = world.call(client, "echo", timeout=1.0, work=0.1)
    while_stopped = world.call(client, "echo", at=2.0, timeout=1.0)
    world.stop(client, at=1.01, resume_at=4.0)
    world.settle()
    assert call.outcome in ("replied", "CallTimeout")
    assert call.finished_at is not None
    assert call.finished_at >= 4.0
    assert while_stopped.started >= 4.0
    assert while_stopped.outcome == "replied"


def test_a_stopped_process_can_be_killed(world: World) -> None:
    server, client = pair(world)
    world.stop(server, resume_at=9.0)
    world.crash(server, at=2.0)
    world.restart(server, at=3.0)
    call = world.call(client, "echo", at=1.5, timeout=5.0)
    world.run(until=4.0)
    assert (call.outcome, call.executed) == ("PeerLost", "unknown")
    assert world.views_agree()
    world.settle()


def test_hung_handlers_leave_input_and_output_alive(world: World) -> None:
    server, client = pair(world)
    world.hang(server, until=6.0)
    cast, call = (world.cast(client, "echo", at=2.0), world.call(client, "echo", at=2.0, timeout=1.0))
    world.run(until=7.0)
    world.settle()
    assert (cast.outcome, cast.times_run) == ("taken", 1)
    assert (call.outcome, call.times_run) == ("CallTimeout", 1)


def test_slow_handlers_take_longer_for_a_time(world: World) -> None:
    server, client = pair(world)
    world.slow_down(server, 50.0, until=3.0)
    slow, fast = (world.call(client, "echo", at=at, work=0.01) for at in (2.0, 4.0))
    world.settle()
    assert [slow.finished_at - slow.started > 0.5, fast.finished_at - fast.started > 0.5] == [True, False]


def test_a_connection_that_is_reset_is_made_again_with_the_same_process_and_the_call_goes_on(world: World) -> None:
    server, client = pair(world)
    call = world.call(client, "echo", at=1.5, work=1.0)
    world.reset([server], at=2.0)
    again = world.call(client, "echo", at=4.0)
    world.run(until=5.0)
    world.settle()
    assert (call.outcome, call.executed, call.times_run) == ("replied", "yes", 1)
    assert client.engine.resumed == 1
    assert again.outcome == "replied"
    assert again.executions[0].node == call.executions[0].node


def test_a_delay_slows_what_passes_and_loses_nothing(world: World) -> None:
    server, client = pair(world)
    world.delay([server], [client], 0.2, until=5.0)
    during, after = (world.call(client, "echo", at=at, work=0.0) for at in (2.0, 8.0))
    world.settle()
    assert {during.outcome, after.outcome} == {"replied"}
    assert during.finished_at - during.started > 0.2 > after.finished_at - after.started


def test_a_node_that_is_told_nothing_finds_a_new_server_later(world: World) -> None:
    server, client = pair(world)
    world.deafen(client, until=5.0)
    world.crash(server, at=2.0)
    world.restart(server, at=2.5)
    before, after = (world.call(client, "echo", at=at, ready_timeout=0.5) for at in (4.0, 6.0))
    world.settle()
    assert [before.outcome in ("NoRoute", "PeerLost"), after.outcome] == [True, "replied"]


def test_a_record_that_lapses_comes_back(world: World) -> None:
    server, client = pair(world)
    world.lapse(server, at=2.0, back_at=4.0)
    during, after = (world.call(client, "echo", at=at, ready_timeout=0.5) for at in (3.0, 5.0))
    world.settle()
    assert (during.outcome, after.outcome) == ("NoRoute", "replied")
    assert world.views_agree()


def test_records_of_the_dead_that_return_mislead_nobody_for_long(world: World) -> None:
    server, client = pair(world)
    world.crash(server, at=2.0)
    world.restart(server, at=3.0)
    world.recall(at=4.0, until=8.0)
    calls = world.call_randomly(rate=20, service="echo", callers=[client])
    world.run(until=10.0)
    world.settle()
    assert {call.outcome for call in calls if call.started > 5.0} == {"replied"}
    assert world.views_agree()


def test_clocks_need_not_agree(world: World) -> None:
    server = world.place(0, [Offer("echo", "one", workers=1)], offset=80_000.0, rate=1.002)
    client = world.place(1, [], offset=3.0, rate=0.998)
    world.start([server, client])
    busy = world.call(client, "echo", at=0.1, timeout=5.0, work=2.0)
    expires = world.call(client, "echo", at=0.2, timeout=1.0, work=0.0)
    world.settle()
    assert (busy.outcome, expires.outcome, expires.times_run) == ("replied", "CallTimeout", 0)


def test_late_housekeeping_is_made_good(world: World) -> None:
    server, client = pair(world)
    world.delay_housekeeping(client, 3.0, until=9.0)
    world.reset([server], at=2.0)
    world.run(until=16.0)
    call = world.call(client, "echo")
    world.settle()
    assert call.outcome == "replied"


def test_a_process_at_the_address_of_another_gets_nothing_that_was_meant_for_it() -> None:
    calls = tuple(Ask(0.1 * step, "call", 1, "agent", "agent-0") for step in range(1, 60))
    sites = (Site(0, keeps_address=True), Site(1, "conductor"))
    plan = Plan(1, 6.0, sites, calls, (Fault("crash", 1.0, 1.2, (0,)), Fault("deaf", 0.9, 4.0, (1,))))
    result = play(plan)
    assert result.broken == []
    assert result.summary["outcomes"]["replied"] > 20


@pytest.mark.parametrize("fault", ["hang", "stop"])
def test_who_hangs_is_avoided_within_six_seconds_and_asked_again_within_five(world: World, fault: str) -> None:
    servers, clients = world.nodes(3, service="echo"), world.nodes(10)
    calls = world.call_randomly(100.0, 30.0, service="echo", callers=clients)
    struck = servers[0]
    if fault == "hang":
        world.hang(struck, at=5.0, until=35.0)
    else:
        world.stop(struck, at=5.0, resume_at=35.0)
    world.run(until=45.0)
    asked = sorted(when for call in calls for node, when in call.asked if node == struck.id)
    assert not [when for when in asked if 11.0 < when < 35.0]
    assert [when for when in asked if 35.0 < when < 40.0]
    world.settle()
    assert all(call.finished_once for call in calls)
    others = [call for call in calls if struck.id not in [node for node, _ in call.asked]]
    assert {call.outcome for call in others} == {"replied"}

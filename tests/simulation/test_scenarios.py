"""What callers are promised, in a world where everything that can go wrong does."""

from __future__ import annotations

from itertools import pairwise

import pytest

from onehop.errors import Rejected
from onehop.protocol import wire
from onehop.testing.offer import Offer
from onehop.testing.simulation import World


def test_calls_finish_once_across_a_partition(world: World) -> None:
    nodes = world.nodes(50, service="echo")
    calls = world.call_randomly(rate=200, timeout=2.0)
    world.partition(nodes[:20], nodes[20:], at=3.0, repair_at=12.0)
    world.run(until=20.0)
    world.settle()
    assert len(calls) > 3_000
    assert all(call.finished_once for call in calls)
    assert world.views_agree(within=5.0)
    outcomes = world.outcomes()
    assert outcomes["replied"] > 2_000
    assert outcomes.keys() <= {"replied", "CallTimeout", "PeerLost", "NoRoute"}
    assert all(call.outcome == "replied" for call in calls if call.started > 19.0)


def test_a_partition_is_noticed_by_missing_heartbeats_within_seven_seconds(world: World) -> None:
    server, client = *world.nodes(1, service="echo"), *world.nodes(1)
    before = world.call(client, "echo", at=0.1)
    during = world.call(client, "echo", at=1.1, timeout=30.0)
    world.partition([server], [client], at=1.0)
    world.run(until=9.0)
    assert (before.outcome, during.outcome, during.executed) == ("replied", "PeerLost", "unknown")
    assert during.finished_at is not None
    assert 4.5 <= during.finished_at - 1.0 <= 7.0
    world.repair()
    assert world.views_agree()
    assert world.call(client, "echo", at=world.now, timeout=1.0).outcome is None
    world.settle()
    assert world.ledger[-1].outcome == "replied"


def test_a_short_partition_only_delays(world: World) -> None:
    server, client = *world.nodes(1, service="echo"), *world.nodes(1)
    world.call(client, "echo", at=0.1)
    call = world.call(client, "echo", at=1.5, timeout=5.0)
    world.partition([server], [client], at=1.0, repair_at=3.0)
    world.settle()
    assert call.outcome == "replied"
    assert call.finished_at is not None
    assert call.finished_at > 3.0


@pytest.mark.parametrize("towards_server", [True, False])
def test_a_one_way_partition_ends_connections_too(world: World, towards_server: bool) -> None:
    server, client = *world.nodes(1, service="echo"), *world.nodes(1)
    world.call(client, "echo", at=0.1)
    call = world.call(client, "echo", at=1.1, timeout=20.0)
    a, b = ([client], [server]) if towards_server else ([server], [client])
    world.partition(a, b, at=1.0, repair_at=15.0, one_way=True)
    world.settle()
    assert (call.outcome, call.executed) == ("PeerLost", "unknown")
    assert call.times_run == (0 if towards_server else 1)


def test_a_crash_is_heard_at_once_by_everybody_who_waits(world: World) -> None:
    server, *clients = *world.nodes(1, service="echo"), *world.nodes(20)
    for client in clients:
        world.call(client, "echo", at=0.1)
    calls = [world.call(client, "echo", at=1.0, timeout=60.0, work=30.0) for client in clients]
    world.crash(server, at=2.0)
    world.run(until=2.1)
    assert {(call.outcome, call.executed, call.times_run) for call in calls} <= {
        ("PeerLost", "unknown", n) for n in (0, 1)
    }
    world.settle()


def test_a_dead_host_is_noticed_within_seven_seconds(world: World) -> None:
    server, client = *world.nodes(1, service="echo"), *world.nodes(1)
    world.call(client, "echo", at=0.1)
    call = world.call(client, "echo", at=1.0, timeout=60.0, work=30.0)
    world.crash(server, at=2.0, power_lost=True)
    world.run(until=9.0)
    assert (call.outcome, call.executed) == ("PeerLost", "unknown")
    world.restart(server, at=12.0)
    again = world.call(client, "echo", at=13.0)
    world.settle()
    assert again.outcome == "replied"


def test_a_call_to_a_server_that_died_unnoticed_goes_to_another(world: World) -> None:
    servers, client = world.nodes(3, service="echo"), world.nodes(1)[0]
    world.registry_away(at=0.5)
    world.crash(servers[0], at=1.0)
    calls = [world.call(client, "echo", at=1.5 + index / 10) for index in range(12)]
    world.settle()
    assert {call.outcome for call in calls} == {"replied"}
    assert client.engine.retried > 0


def test_a_server_that_restarts_is_another_peer_and_serves_again(world: World) -> None:
    server, client = *world.nodes(1, service="echo"), *world.nodes(1)
    first = [world.call(client, "echo", at=0.1 * index) for index in range(1, 9)]
    world.run(until=1.0)
    before = server.id
    world.restart(server, at=1.0)
    second = [world.call(client, "echo", at=2.0 + 0.1 * index) for index in range(8)]
    world.settle()
    assert server.id != before
    assert {call.outcome for call in first + second} == {"replied"}
    assert {run.node for call in second for run in call.executions} == {server.id}


def test_a_node_whose_record_goes_and_comes_back_is_not_taken_for_a_duplicate(world: World) -> None:
    server, client = *world.nodes(1, service="echo"), *world.nodes(1)
    for index in range(5):
        world.call(client, "echo", at=0.1 * index)
    record = world.registry.view()[0]
    world.clock.at(1.0, lambda _: world.registry.withdraw(record.node))
    world.clock.at(4.0, lambda _: world.registry.announce(record))
    calls = [world.call(client, "echo", at=5.0 + 0.1 * index) for index in range(5)]
    world.settle()
    assert [call.outcome for call in calls] == ["replied"] * 5
    assert server.is_up


def test_a_drain_fails_no_call(world: World) -> None:
    servers, clients = world.nodes(6, service="echo", work=0.05), world.nodes(30)
    calls = world.call_randomly(rate=600, timeout=3.0, service="echo", callers=clients)
    for index, server in enumerate(servers[:5]):
        world.drain(server, at=1.0 + index)
        world.restart(server, at=1.7 + index)
    world.run(until=8.0)
    world.settle()
    assert len(calls) > 3_000
    assert {call.outcome for call in calls} == {"replied"}


def test_a_drain_with_nothing_owed_refuses_what_is_on_its_way(world: World) -> None:
    servers, clients = world.nodes(2, service="echo"), world.nodes(40)
    for client in clients:
        for index in range(4):
            world.call(client, "echo", at=0.1 + index / 10)
    world.drain(servers[0], at=1.0)
    calls = [world.call(client, "echo", at=0.998 + index / 10_000, work=0.0) for index, client in enumerate(clients)]
    world.settle()
    assert {call.outcome for call in calls} == {"replied"}


def test_an_overloaded_server_refuses_and_says_so_in_milliseconds(world: World) -> None:
    world.nodes(1, service="echo", room=10, workers=1)
    client = world.nodes(1)[0]
    calls = [world.call(client, "echo", at=1.0, timeout=60.0, work=1.0) for _ in range(30)]
    world.run(until=1.1)
    refused = [call for call in calls if call.outcome == "Rejected"]
    assert len(refused) == 20
    assert {(call.executed, call.times_run) for call in refused} == {("no", 0)}
    assert all(isinstance(call.error, Rejected) and call.error.reason == "full" for call in refused)
    world.settle()
    assert sum(call.outcome == "replied" for call in calls) == 10


def test_a_caller_does_not_pass_its_own_window(world: World) -> None:
    world.nodes(1, service="echo")
    client = world.nodes(1, window=16)[0]
    world.call(client, "echo", at=0.1)
    calls = [world.call(client, "echo", at=1.0, work=0.5) for _ in range(20)]
    world.settle()
    outcomes = [call.outcome for call in calls]
    assert (outcomes.count("replied"), outcomes.count("Rejected")) == (16, 4)


def test_messages_that_arrive_twice_run_once(world: World) -> None:
    world.network.duplicates = 1.0
    world.nodes(3, service="echo")
    clients = world.nodes(5)
    calls = world.call_randomly(rate=100, service="echo", callers=clients)
    casts = world.call_randomly(rate=100, service="echo", callers=clients, kind="cast")
    world.run(until=5.0)
    world.settle()
    assert {(call.outcome, call.times_run) for call in calls} == {("replied", 1)}
    assert {(cast.outcome, cast.times_run) for cast in casts} == {("taken", 1)}


def test_what_is_held_up_arrives_in_order_when_it_is_released(world: World) -> None:
    server, client = *world.nodes(1, service="echo", workers=1), *world.nodes(1)
    world.call(client, "echo", at=0.1)
    calls = [world.call(client, "echo", at=1.0 + index / 100, timeout=10.0) for index in range(20)]
    world.hold([server], [client], at=0.9, release_at=5.0)
    world.run(until=4.9)
    assert all(call.outcome is None for call in calls)
    world.settle()
    assert {call.outcome for call in calls} == {"replied"}
    starts = [call.executions[0].time for call in calls]
    assert starts == sorted(starts)


def test_a_request_that_expired_while_it_was_held_up_is_cancelled_or_runs_once(world: World) -> None:
    server, client = *world.nodes(1, service="echo"), *world.nodes(1)
    world.call(client, "echo", at=0.1)
    call = world.call(client, "echo", at=1.0, timeout=1.0)
    world.hold([client], [server], at=0.9, release_at=5.0, one_way=True)
    world.settle()
    assert (call.outcome, call.executed) == ("CallTimeout", "unknown")
    assert call.times_run <= 1


def test_a_request_that_expires_in_the_queue_never_runs(world: World) -> None:
    world.nodes(1, service="echo", workers=1)
    client = world.nodes(1)[0]
    first = world.call(client, "echo", at=0.1, work=2.0, timeout=5.0)
    second = world.call(client, "echo", at=0.2, timeout=1.0)
    world.settle()
    assert (first.outcome, first.times_run) == ("replied", 1)
    assert (second.outcome, second.executed, second.times_run) == ("CallTimeout", "unknown", 0)


def test_a_reply_after_its_deadline_is_dropped(world: World) -> None:
    server, client = *world.nodes(1, service="echo"), *world.nodes(1)
    call = world.call(client, "echo", at=0.1, work=1.0, timeout=0.5)
    world.settle()
    assert (call.outcome, call.executed, call.times_run) == ("CallTimeout", "unknown", 1)
    assert client.engine.protocol.peers.peers[server.id].calls.late == 1


def test_traffic_goes_on_while_the_registry_is_away(world: World) -> None:
    world.nodes(10, service="echo")
    world.registry_away(at=1.0)
    calls = world.call_randomly(rate=100)
    world.run(until=10.0)
    world.settle()
    assert {call.outcome for call in calls} == {"replied"}


def test_a_named_server_is_never_replaced_by_another(world: World) -> None:
    servers, client = world.nodes(5, service="echo"), world.nodes(1)[0]
    world.crash(servers[2], at=1.0)
    before = world.call(client, "echo", server="server-2", at=0.5)
    after = world.call(client, "echo", server="server-2", at=3.0, timeout=5.0)
    world.restart(servers[2], at=6.0)
    again = world.call(client, "echo", server="server-2", at=7.0)
    world.settle()
    assert (before.outcome, before.executions[0].server) == ("replied", "server-2")
    assert (after.outcome, after.executed) == ("NoRoute", "no")
    assert (again.outcome, again.executions[0].node) == ("replied", servers[2].id)


def test_a_call_waits_a_moment_for_somebody_to_serve(world: World) -> None:
    client = world.nodes(1)[0]
    nobody = world.call(client, "echo", at=0.0, timeout=5.0)
    soon = world.call(client, "echo", at=1.5, timeout=5.0)
    world.clock.at(2.0, lambda _: world.nodes(1, service="echo") and None)
    world.settle()
    assert (nobody.outcome, nobody.executed) == ("NoRoute", "no")
    assert nobody.finished_at == pytest.approx(1.0)
    assert soon.outcome == "replied"


def test_a_fan_out_is_answered_for_by_each_receiver(world: World) -> None:
    servers, client = world.nodes(8, service="echo"), world.nodes(1)[0]
    first = world.fanout(client, "echo", at=1.0)
    world.crash(servers[0], at=2.0)
    world.partition([servers[1]], [client], at=2.0, repair_at=20.0)
    world.registry_away(at=1.9, back_at=20.0)
    second = world.fanout(client, "echo", at=3.0, timeout=2.0)
    world.settle()
    assert [part.outcome for part in first.parts] == ["taken"] * 8
    told = {part.server: part.outcome for part in second.parts}
    assert told.pop("server-1") == "CallTimeout"
    assert told.pop("server-0", "PeerLost") == "PeerLost"  # left out while it rests
    assert told == {f"server-{index}": "taken" for index in range(2, 8)}
    assert all(part.times_run == (part.outcome == "taken") for part in second.parts)


def test_a_gathering_names_who_did_not_reply(world: World) -> None:
    world.nodes(4, service="echo")
    slow, client = *world.nodes(1, service="echo", work=0.01), *world.nodes(1)
    world.hold([slow], [client], at=0.5, release_at=10.0)
    gathered = world.gather(client, "echo", at=1.0, timeout=2.0)
    world.settle()
    assert {part.server: part.outcome for part in gathered.parts if part.outcome != "replied"} == {
        f"server-{slow.index}": "CallTimeout"
    }


def test_a_slow_handler_gives_signs_of_life(world: World) -> None:
    world.nodes(1, service="echo")
    client = world.nodes(1)[0]
    call = world.call(client, "echo", at=0.1, timeout=60.0, work=20.0, monitor=1.0)
    world.settle()
    assert (call.outcome, call.finished_at) == ("replied", pytest.approx(20.1, abs=0.1))


def test_a_process_that_hangs_is_given_up_for_want_of_signs(world: World) -> None:
    server, client = *world.nodes(1, service="echo"), *world.nodes(1)
    call = world.call(client, "echo", at=0.1, timeout=60.0, work=50.0, monitor=1.0)
    world.hold([server], [client], at=5.0, release_at=20.0)
    world.run(until=6.2)
    assert (call.outcome, call.executed) == ("CallTimeout", "unknown")
    world.settle()


def test_an_idempotent_request_is_sent_again_after_a_loss(world: World) -> None:
    servers, client = world.nodes(2, service="echo"), world.nodes(1)[0]
    calls = [world.call(client, "echo", at=0.1, timeout=20.0, work=2.0, idempotent=True) for _ in range(10)]
    world.crash(servers[0], at=1.0)
    world.settle()
    assert {call.outcome for call in calls} == {"replied"}
    assert max(call.times_run for call in calls) == 2


def test_an_idempotent_request_that_ran_and_was_lost_does_not_end_as_not_executed(world: World) -> None:
    server, client = *world.nodes(1, service="echo"), *world.nodes(1)
    call = world.call(client, "echo", at=0.1, timeout=20.0, ready_timeout=5.0, work=2.0, idempotent=True)
    world.registry_away(at=0.5)
    world.crash(server, at=1.0)
    world.settle()
    assert call.outcome in ("PeerLost", "NoRoute")
    assert (call.executed, call.times_run) == ("unknown", 1)
    assert client.engine.retried >= 1


def test_a_handler_that_raises_is_told_to_its_caller(world: World) -> None:
    world.nodes(1, service="echo")
    call = world.call(world.nodes(1)[0], "echo", at=0.1, fails=True)
    world.settle()
    assert (call.outcome, call.executed, call.times_run) == ("failed", "yes", 1)


def test_large_bodies_travel_behind_their_header(world: World) -> None:
    world.nodes(1, service="echo")
    call = world.call(world.nodes(1)[0], "echo", at=0.1, size=2 * wire.SECOND_FRAME_FROM)
    world.settle()
    assert call.outcome == "replied"


def test_when_everybody_restarts_at_once_all_find_each_other_again(world: World) -> None:
    nodes = world.nodes(60, service="echo")
    world.call_randomly(rate=300)
    for node in nodes:
        world.restart(node, at=5.0)
    world.run(until=6.0)
    assert world.views_agree(within=0.5)
    calls = world.call_randomly(rate=300)
    world.run(until=8.0)
    world.settle()
    assert {call.outcome for call in calls} == {"replied"}


def test_a_server_that_was_busy_is_chosen_again_once_it_is_not(world: World) -> None:
    servers, client, others = world.nodes(3, service="echo", workers=1), world.nodes(1)[0], world.nodes(3)
    burst = [world.call(other, "echo", server="server-0", at=1.0, timeout=30.0, work=0.05) for other in others * 20]
    seen = world.call(client, "echo", server="server-0", at=1.01, timeout=30.0)
    calls = world.call_randomly(rate=50, service="echo", callers=[client], work=0.001)
    world.run(until=20.0)
    world.settle()
    assert {call.outcome for call in [*burst, seen]} == {"replied"}
    late = [call for call in calls if call.started > 10.0]
    shares = [sum(call.executions[0].node == server.id for call in late) / len(late) for server in servers]
    assert min(shares) > 0.2


def test_several_instances_of_one_name_share_its_requests(world: World) -> None:
    world.nodes(2, offers=[Offer("echo", "shared"), Offer("echo", "shared")])
    calls = world.call_randomly(rate=100, service="echo", callers=world.nodes(2))
    world.run(until=3.0)
    fanout = world.fanout(world.nodes(1)[0], "echo", at=3.5)
    world.settle()
    assert {call.outcome for call in calls} == {"replied"}
    assert [part.times_run for part in fanout.parts] == [2, 2]


@pytest.mark.parametrize("period", [1.0, 5.0])
def test_a_thousand_callers_of_a_server_that_starts_anew_come_back_in_turn(world: World, period: float) -> None:
    (server,) = world.nodes(1, service="echo")
    callers = world.nodes(1_000)
    for number, caller in enumerate(callers):
        for start in (0.0, *(1.0 + period * count for count in range(int(15 / period)))):
            at = start + number / 1_000 * (period if start else 1.0)
            world.call(caller, "echo", at=at, timeout=60.0, ready_timeout=1.0)
    world.crash(server, at=3.0)
    world.restart(server, at=4.0)
    opened = []
    for second in range(3, 20):
        world.run(until=float(second))
        opened.append(world.network.opened_links)
    world.settle()
    returned = world.network.opened_links - opened[0]
    assert 1_000 <= returned < 2_500
    assert opened[-1] == opened[-2] == world.network.opened_links, "all are back before the 18th second"
    busiest = max(then - before for before, then in pairwise(opened))
    print(f"R18  1,000 simulated callers, a call each {period:g} s: {busiest} connections in the busiest second")
    assert busiest < 300, f"{busiest} connections in one second, {returned} in all"
    last = [entry for caller in callers for entry in [world.call(caller, "echo", at=world.now, timeout=5.0)]]
    world.settle()
    assert {entry.outcome for entry in last} == {"replied"}

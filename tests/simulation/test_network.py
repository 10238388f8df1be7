"""What only the model has: virtual time, and faults on demand. What it shares with ZeroMQ is in tests/conformance."""

from __future__ import annotations

from typing import Any

import zmq

from onehop.testing.clock import Clock
from onehop.testing.network import DOWN_ROOM, HEARTBEAT_EVERY, HEARTBEAT_TIMEOUT, UP_ROOM, Inbound, Link, Network
from onehop.transport.sockets import INBOUND_OPTIONS, LINK_OPTIONS


def joined(seed: int = 1) -> tuple[Network, Inbound, Link]:
    network = Network(Clock(seed))
    inbound = network.bind(1, "virtual://there")
    link = network.connect(2, "virtual://there")
    network.clock.run(1.0)
    return network, inbound, link


def arrived(socket: Inbound | Link) -> list[Any]:
    """All messages that are there."""
    messages: list[Any] = []
    assert not socket.drain(1_000, messages)
    return messages


def test_figures_of_the_model_are_those_of_the_sockets() -> None:
    link, inbound = ({option: value for option, value, _ in table} for table in (LINK_OPTIONS, INBOUND_OPTIONS))
    assert HEARTBEAT_EVERY == link[zmq.HEARTBEAT_IVL] / 1000 == inbound[zmq.HEARTBEAT_IVL] / 1000
    assert HEARTBEAT_TIMEOUT == link[zmq.HEARTBEAT_TIMEOUT] / 1000 == inbound[zmq.HEARTBEAT_TIMEOUT] / 1000
    assert link[zmq.SNDHWM] + inbound[zmq.RCVHWM] == UP_ROOM
    assert inbound[zmq.SNDHWM] + link[zmq.RCVHWM] == DOWN_ROOM


def test_actions_of_one_moment_run_in_the_order_they_were_planned() -> None:
    clock, seen = Clock(), []
    for number in range(5):
        clock.at(1.0, seen.append, number)
    clock.at(0.5, seen.append, "first")
    clock.at(2.5, seen.append, "too late")
    clock.run(2.0)
    assert seen == ["first", 0, 1, 2, 3, 4]
    assert clock.now == 2.0


def test_a_message_takes_time_and_none_overtakes_another() -> None:
    network, inbound, link = joined()
    for number in range(200):
        assert link.send(bytes([number]))
    network.clock.run(network.clock.now)
    assert arrived(inbound) == []
    network.clock.run(network.clock.now + 1.0)
    assert [frame[0] for _, frame, _ in arrived(inbound)] == list(range(200))


def test_a_disconnect_loses_what_was_under_way_from_some_point_on() -> None:
    lost = []
    for seed in range(20):
        network, inbound, link = joined(seed)
        for number in range(10):
            link.send(bytes([number]))
        link.close(0.0)
        network.clock.run(2.0)
        numbers = [frame[0] for _, frame, _ in arrived(inbound)]
        assert numbers == list(range(len(numbers)))
        lost.append(10 - len(numbers))
    assert min(lost) < 3 < 7 < max(lost)


def test_a_cut_of_one_direction_lets_the_other_through() -> None:
    network, inbound, link = joined()
    link.send(b"up")
    network.clock.run(2.0)
    [(identity, _, _)] = arrived(inbound)
    cut = network.cut([2], [1], one_way=True)
    link.send(b"held")
    inbound.send(identity, b"down")
    network.clock.run(3.0)
    assert arrived(link) == [(b"down", None)]
    assert arrived(inbound) == []
    network.mend(cut)
    network.clock.run(4.0)
    assert arrived(inbound) == [(identity, b"held", None)]


def test_both_sides_notice_a_cut_by_missing_heartbeats_and_a_hold_never() -> None:
    network, inbound, link = joined()
    hold = network.cut([1], [2], is_hold=True)
    network.clock.run(60.0)
    assert link.ended() is None
    network.mend(hold)
    network.cut([1], [2])
    network.clock.run(60.0 + HEARTBEAT_TIMEOUT)
    assert link.ended() is None
    assert len(inbound.connections) == 1
    network.clock.run(60.0 + HEARTBEAT_TIMEOUT + HEARTBEAT_EVERY)
    assert link.ended() == "no heartbeat was answered"
    assert not inbound.connections


def test_a_cut_that_is_mended_in_time_and_comes_again_is_timed_anew() -> None:
    network, _, link = joined()
    first = network.cut([1], [2])
    network.clock.run(4.0)
    network.mend(first)
    network.cut([1], [2])
    network.clock.run(4.0 + HEARTBEAT_TIMEOUT - 0.1)
    assert link.ended() is None
    network.clock.run(4.0 + HEARTBEAT_TIMEOUT + HEARTBEAT_EVERY)
    assert link.ended() is not None


def test_a_connection_begun_during_a_cut_is_made_when_it_is_mended() -> None:
    network = Network(Clock(1))
    inbound = network.bind(1, "virtual://there")
    cut = network.cut([1], None)
    link = network.connect(2, "virtual://there")
    link.send(b"hello")
    network.clock.run(1.0)
    assert not inbound.connections
    network.mend(cut)
    network.clock.run(2.0)
    assert arrived(inbound) == [(link.identity, b"hello", None)]

"""What every carrier promises and withholds: ZeroMQ, memory, and the model that the simulation believes in."""

from __future__ import annotations

import os
import select
from typing import Any

import pytest

from onehop.protocol import wire
from onehop.transport.carrier import Unreachable

ALL = 100_000
"""More messages than any queue has room for."""


def ping(number: int) -> bytes:
    return wire.pack(wire.PING, id=number)


def numbers(messages: list[Any]) -> list[int]:
    return [wire.header(message[-2]).id for message in messages]


def test_messages_to_an_inbound_socket_arrive_whole_and_in_order(arm: Any) -> None:
    inbound, link, identity = arm.joined()
    for number in range(500):
        assert arm.sent(link, ping(number))
    messages = arm.received(inbound, 500)
    assert numbers(messages) == list(range(500))
    assert {message[0] for message in messages} == {identity}


def test_messages_to_a_link_arrive_whole_and_in_order(arm: Any) -> None:
    inbound, link, identity = arm.joined()
    for number in range(500):
        assert arm.wait(lambda number=number: inbound.send(identity, ping(number)), 5.0)
    assert numbers(arm.received(link, 500)) == list(range(500))


@pytest.mark.parametrize("size", [0, 1, 255, 256, wire.SECOND_FRAME_FROM - 1])
def test_small_bodies_travel_in_the_frame(arm: Any, size: int) -> None:
    inbound, link, identity = arm.joined()
    frame = wire.answer(wire.REPLY, 0, 7, os.urandom(size))
    assert arm.sent(link, frame)
    assert arm.received(inbound, 1) == [(identity, frame, None)]
    assert inbound.send(identity, frame)
    assert arm.received(link, 1) == [(frame, None)]


@pytest.mark.parametrize("size", [wire.SECOND_FRAME_FROM, 3_000_000])
def test_large_bodies_travel_as_a_second_frame_of_the_same_message(arm: Any, size: int) -> None:
    inbound, link, identity = arm.joined()
    frame = wire.answer(wire.REPLY, 0, 7, os.urandom(size))
    head, body = frame
    assert arm.sent(link, frame)
    assert arm.sent(link, ping(8))
    assert arm.received(inbound, 2) == [(identity, head, body), (identity, ping(8), None)]
    assert inbound.send(identity, frame)
    assert inbound.send(identity, ping(9))
    assert arm.received(link, 2) == [(head, body), (ping(9), None)]


def test_each_connection_has_an_identity_of_its_own(arm: Any) -> None:
    inbound = arm.bind()
    links = [arm.connect(inbound.endpoints[0]) for _ in range(5)]
    for number, link in enumerate(links):
        assert arm.sent(link, ping(number))
    identities = {wire.header(frame).id: identity for identity, frame, _ in arm.received(inbound, 5)}
    assert len({*identities.values()}) == 5
    for number, identity in identities.items():
        assert inbound.send(identity, ping(100 + number))
    for number, link in enumerate(links):
        assert numbers(arm.received(link, 1)) == [100 + number]


def test_what_is_sent_before_the_connection_stands_arrives_first(arm: Any) -> None:
    inbound = arm.bind()
    link = arm.connect(inbound.endpoints[0])
    assert arm.sent(link, ping(1))
    assert arm.sent(link, ping(2))
    assert numbers(arm.received(inbound, 2)) == [1, 2]


def test_the_end_is_reported_to_the_connecting_side(arm: Any) -> None:
    inbound, link, _ = arm.joined()
    assert link.ended() is None
    arm.closed(inbound)
    assert arm.wait(link.ended, 5.0)
    assert link.ended() == "the connection ended"


def test_connecting_to_nobody_is_reported(arm: Any) -> None:
    link = arm.connect(arm.address())
    assert arm.wait(link.ended, 5.0)
    assert link.ended() == "nobody listens there"


def test_a_connection_that_ended_does_not_come_back_by_itself(arm: Any) -> None:
    inbound, link, _ = arm.joined()
    endpoint = inbound.endpoints[0]
    arm.closed(inbound)
    assert arm.wait(link.ended, 5.0)
    assert not endpoint.startswith("ipc") or arm.wait(lambda: not os.path.exists(endpoint[6:]), 5.0)
    again = arm._carrier.bind(endpoint)
    arm._open.append(again)
    link.send(ping(1))  # refused, or lost
    assert arm.received(again, 1, within=0.2) == []


def test_an_identity_that_is_not_known_is_unreachable(arm: Any) -> None:
    inbound, _, _ = arm.joined()
    with pytest.raises(Unreachable):
        inbound.send(b"\0nope", ping(1))


def test_a_connection_that_its_caller_closed_becomes_unreachable(arm: Any) -> None:
    inbound, link, identity = arm.joined()
    arm.closed(link)

    def is_unreachable() -> bool:
        try:
            inbound.receive()  # ZeroMQ hears of ends only when it is asked for something
            inbound.send(identity, ping(1))
        except Unreachable:
            return True
        return False

    assert arm.wait(is_unreachable, 5.0)


def test_what_was_under_way_when_a_link_closes_arrives_up_to_some_point(arm: Any) -> None:
    inbound, link, _ = arm.joined()
    sent = 0
    while sent < 2_000 and link.send(ping(sent)):
        sent += 1
    arm.closed(link)
    arrived = numbers(arm.received(inbound, sent, within=0.3))
    assert arrived == list(range(len(arrived)))


def test_what_was_under_way_when_an_inbound_socket_closes_arrives_up_to_some_point(arm: Any) -> None:
    inbound, link, identity = arm.joined()
    for number in range(2_000):
        assert inbound.send(identity, ping(number))
    arm.closed(inbound)
    assert arm.wait(link.ended, 5.0)
    arrived = numbers(arm.received(link, 2_000, within=0.3))
    assert arrived == list(range(len(arrived)))


def test_what_lingers_arrives_before_the_end_of_an_inbound_socket(arm: Any) -> None:
    inbound, link, identity = arm.joined()
    for number in range(300):
        assert inbound.send(identity, ping(number))
    arm.closed(inbound, 2.0)
    assert arm.wait(link.ended, 5.0)
    arrived = []
    while link.readable():
        arrived.append(link.receive())
    assert numbers(arrived) == list(range(300))


def test_what_lingers_arrives_before_the_end_of_a_link(arm: Any) -> None:
    inbound, link, _ = arm.joined()
    for number in range(300):
        assert arm.sent(link, ping(number))
    arm.closed(link, 2.0)
    assert numbers(arm.received(inbound, 300)) == list(range(300))


def test_a_sender_to_a_peer_that_never_reads_is_refused_at_last(arm: Any) -> None:
    inbound, link, _ = arm.joined()
    sent = 0
    while sent < ALL and link.send(ping(sent)):
        sent += 1
    assert 1_000 < sent < ALL
    arrived = numbers(arm.received(inbound, sent))
    assert arrived == list(range(sent))
    assert arm.sent(link, ping(sent))


def test_an_answer_to_a_peer_that_never_reads_is_refused_at_last_and_holds_up_nobody(arm: Any) -> None:
    inbound, link, identity = arm.joined()
    other = arm.connect(inbound.endpoints[0])
    assert arm.sent(other, ping(0))
    ((other_identity, _, _),) = arm.received(inbound, 1)
    sent = 0
    while sent < ALL and inbound.send(identity, ping(sent)):
        sent += 1
    assert 1_000 < sent < ALL
    assert inbound.send(other_identity, ping(1))
    assert numbers(arm.received(other, 1)) == [1]
    arrived = numbers(arm.received(link, sent))
    assert arrived == list(range(sent))
    assert arm.wait(lambda: inbound.send(identity, ping(sent)), 5.0)


def test_nothing_to_receive_is_none(arm: Any) -> None:
    inbound, link, _ = arm.joined()
    assert not inbound.readable()
    assert inbound.receive() is None
    assert not link.readable()
    assert link.receive() is None


# What a thread can poll ---------------------------------------------------------------------------


def is_signalled(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


@pytest.mark.parametrize("of_link", [True, False])
def test_a_descriptor_signals_what_came_since_a_look_that_found_nothing(real_arm: Any, of_link: bool) -> None:
    inbound, link, identity = real_arm.joined()
    reader = link if of_link else inbound

    def send(number: int) -> None:
        assert inbound.send(identity, ping(number)) if of_link else real_arm.sent(link, ping(number))

    for round_of in range(20):
        assert not reader.readable()
        assert not is_signalled(reader.fd, 0.0)
        send(round_of)
        assert is_signalled(reader.fd, 5.0)
        assert numbers(real_arm.received(reader, 1)) == [round_of]


def test_a_descriptor_is_an_edge_that_a_look_eats(real_arm: Any) -> None:
    inbound, link, _ = real_arm.joined()
    assert real_arm.sent(link, ping(1))
    assert real_arm.wait(inbound.readable, 5.0)
    assert real_arm.sent(link, ping(2))
    assert real_arm.wait(inbound.readable, 5.0)
    assert numbers(real_arm.received(inbound, 2)) == [1, 2]
    # Whether it still signals now is open; after a look that finds nothing it must not.
    assert not inbound.readable()
    assert not is_signalled(inbound.fd, 0.05)


def test_a_descriptor_signals_the_end(real_arm: Any) -> None:
    inbound, link, _ = real_arm.joined()
    assert link.ended() is None
    assert not is_signalled(link.monitor_fd, 0.0)
    real_arm.closed(inbound)
    assert is_signalled(link.monitor_fd, 5.0)
    assert real_arm.wait(link.ended, 5.0)

"""What every carrier promises and withholds: ZeroMQ, memory, and the model that the simulation believes in."""

from __future__ import annotations

import os
import select
from typing import Any

import pytest

from onehop.protocol import wire

ALL = 1_000_000  # more than queues and the kernel hold
"""More messages than any queue has room for."""


def ping(number: int) -> bytes:
    return wire.pack(wire.PING, id=number)


def numbers(messages: list[Any]) -> list[int]:
    return [wire.header(message[-2]).id for message in messages]


def ran_dry(socket: Any) -> bool:
    """Whether a look found nothing at all."""
    found: list[Any] = []
    return socket.drain(1, found) is False and found == []


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
    assert arm.answered(inbound, identity, frame)
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
    with pytest.raises(ConnectionResetError):
        inbound.send(b"\0nope", ping(1))


def test_a_connection_that_its_caller_closed_becomes_unreachable(arm: Any) -> None:
    inbound, link, identity = arm.joined()
    arm.closed(link)

    def is_unreachable() -> bool:
        try:
            inbound.drain(1, [])  # ZeroMQ hears of ends only when it is asked for something
            inbound.send(identity, ping(1))
        except ConnectionResetError:
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
    arrived: list[Any] = []
    while link.drain(64, arrived):
        pass
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


def test_nothing_to_receive_adds_nothing_and_says_so(arm: Any) -> None:
    inbound, link, _ = arm.joined()
    for socket in (inbound, link):
        found = ["what was there before"]
        assert socket.drain(64, found) is False
        assert found == ["what was there before"]


@pytest.mark.parametrize("of_link", [True, False])
def test_no_more_is_taken_than_the_limit_and_what_is_left_is_told_and_comes_next(arm: Any, of_link: bool) -> None:
    inbound, link, identity = arm.joined()
    reader = link if of_link else inbound
    for number in range(100):
        assert inbound.send(identity, ping(number)) if of_link else arm.sent(link, ping(number))
    assert numbers(arm.received(reader, 50)) == list(range(50)), "a limit has been met"
    found: list[Any] = []
    looks = 0

    def take() -> bool:
        nonlocal looks
        before = len(found)
        more = reader.drain(7, found)
        looks += 1
        assert len(found) - before <= 7
        assert not more or len(found) - before == 7, "True says that the limit came first"
        return len(found) == 50

    assert arm.wait(take, 5.0)
    assert looks >= 8
    assert numbers(found) == list(range(50, 100))
    assert ran_dry(reader)


@pytest.mark.parametrize("of_link", [True, False])
def test_one_look_takes_small_and_large_messages_together_and_in_order(arm: Any, of_link: bool) -> None:
    inbound, link, identity = arm.joined()
    reader = link if of_link else inbound
    sent: list[Any] = []
    for number in range(12):
        body = bytes([number]) * (wire.SECOND_FRAME_FROM if number % 3 == 1 else number)
        frame = wire.answer(wire.REPLY, 0, number, body)
        sent.append((frame, None) if isinstance(frame, bytes) else frame)
        assert arm.answered(inbound, identity, frame) if of_link else arm.sent(link, frame)
    assert [message[-2:] for message in arm.received(reader, 12)] == sent
    assert ran_dry(reader)


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
        assert ran_dry(reader)
        assert not is_signalled(reader.fd, 0.0)
        send(round_of)
        assert is_signalled(reader.fd, 5.0)
        assert numbers(real_arm.received(reader, 1)) == [round_of]


def test_a_descriptor_may_be_silent_until_a_look_ran_dry_and_signals_nothing_then(real_arm: Any) -> None:
    inbound, link, _ = real_arm.joined()
    assert ran_dry(inbound)
    assert real_arm.sent(link, ping(1))
    assert is_signalled(inbound.fd, 5.0)
    assert numbers(real_arm.received(inbound, 1)) == [1]
    assert real_arm.sent(link, ping(2))
    # Whether it signals now is open. Who looks until nothing is left gets what came, and must not be called for it.
    assert numbers(real_arm.received(inbound, 1)) == [2]
    assert ran_dry(inbound)
    assert not is_signalled(inbound.fd, 0.05)
    assert real_arm.sent(link, ping(3))
    assert is_signalled(inbound.fd, 5.0)


def test_a_descriptor_signals_the_end(real_arm: Any) -> None:
    inbound, link, _ = real_arm.joined()
    assert link.ended() is None
    assert not is_signalled(link.monitor_fd, 0.0)
    real_arm.closed(inbound)
    assert is_signalled(link.monitor_fd, 5.0)
    assert real_arm.wait(link.ended, 5.0)

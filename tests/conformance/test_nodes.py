"""What callers are promised, of real nodes over ZeroMQ and memory and of nodes in a simulated world alike."""

from __future__ import annotations

from typing import Any

import pytest

from onehop.protocol import wire


def test_a_call_gets_the_reply_to_its_own_request(cloud: Any) -> None:
    server, client = cloud.server("a"), cloud.client()
    assert cloud.knows(client, 1)
    requests = [cloud.begin(client, work=0.01) for _ in range(20)]
    assert {request.result()[:3] for request in requests} == {("replied", "yes", "a")}
    assert {request.runs for request in requests} == {1}
    assert server is not client


def test_calls_go_round_the_servers(cloud: Any) -> None:
    for name in "abc":
        cloud.server(name)
    client = cloud.client()
    assert cloud.knows(client, 3)
    by = [cloud.begin(client).result().by for _ in range(9)]
    assert sorted(by) == list("aaabbbccc")


def test_a_cast_ends_when_it_is_taken_and_runs_once(cloud: Any) -> None:
    cloud.server("a")
    client = cloud.client()
    assert cloud.knows(client, 1)
    request = cloud.begin(client, kind="cast", work=2.0)
    assert request.result().outcome == "taken"
    assert request.result().seconds < 1.9
    assert cloud.has_run(request)
    assert request.runs == 1


def test_a_fan_out_is_answered_for_by_every_server(cloud: Any) -> None:
    servers = [cloud.server(name) for name in "abc"]
    client = cloud.client()
    assert cloud.knows(client, 3)
    assert cloud.fanout(client) == dict.fromkeys("abc", "taken")
    cloud.crash(servers[0])
    assert cloud.knows(client, 2)
    assert cloud.fanout(client) == dict.fromkeys("bc", "taken")


def test_a_gathering_replies_by_server(cloud: Any) -> None:
    for name in "abc":
        cloud.server(name)
    client = cloud.client()
    assert cloud.knows(client, 3)
    assert cloud.gather(client) == (["a", "b", "c"], [])


def test_nobody_serving_is_no_route_after_the_grace(cloud: Any) -> None:
    client = cloud.client()
    outcomes = [cloud.begin(client, ready_timeout=0.2, timeout=5.0).result() for _ in range(3)]
    assert {each[:2] for each in outcomes} == {("NoRoute", "no")}
    assert 0.19 < min(each.seconds for each in outcomes) < 0.2 + cloud.slack


def test_a_server_that_comes_within_the_grace_is_called(cloud: Any) -> None:
    client = cloud.client()
    request = cloud.begin(client, ready_timeout=5.0, timeout=10.0)
    cloud.server("a")
    assert request.result()[:3] == ("replied", "yes", "a")


def test_a_named_server_is_never_replaced(cloud: Any) -> None:
    first, _second = cloud.server("a"), cloud.server("b")
    client = cloud.client()
    assert cloud.knows(client, 2)
    assert {cloud.begin(client, server="a").result().by for _ in range(5)} == {"a"}
    cloud.crash(first)
    assert cloud.knows(client, 1)
    assert cloud.begin(client, server="a", ready_timeout=0.2).result()[:2] == ("NoRoute", "no")
    again = cloud.server("a")
    assert again is not first
    assert cloud.begin(client, server="a", ready_timeout=2.0, timeout=5.0).result()[:3] == ("replied", "yes", "a")


def test_a_deadline_ends_a_call_in_time_and_its_late_reply_is_dropped(cloud: Any) -> None:
    cloud.server("a")
    client = cloud.client()
    assert cloud.knows(client, 1)
    assert cloud.begin(client).result().outcome == "replied"
    request = cloud.begin(client, work=2.0, timeout=0.2)
    outcome = request.result()
    assert outcome[:2] == ("CallTimeout", "unknown")
    assert 0.19 < outcome.seconds < 0.2 + 3 * cloud.slack
    assert cloud.has_run(request)
    assert cloud.wait(lambda: cloud.late(client) == 1)
    assert cloud.begin(client).result().outcome == "replied"
    assert request.runs == 1


def test_a_request_that_expires_in_the_queue_does_not_run(cloud: Any) -> None:
    cloud.server("a", workers=1)
    client = cloud.client()
    assert cloud.knows(client, 1)
    first = cloud.begin(client, work=0.8)
    assert cloud.has_run(first)
    second = cloud.begin(client, timeout=0.2)
    assert second.result()[:2] == ("CallTimeout", "unknown")
    assert first.result().outcome == "replied"
    assert cloud.begin(client).result().outcome == "replied"
    assert second.runs == 0


def test_a_full_server_refuses(cloud: Any) -> None:
    cloud.server("a", workers=1, inbox_messages=2)
    client = cloud.client()
    assert cloud.knows(client, 1)
    taken = [cloud.begin(client, work=2.0, timeout=10.0)]
    assert cloud.has_run(taken[0])
    more = [cloud.begin(client, work=0.0, timeout=10.0) for _ in range(4)]
    outcomes = [request.result() for request in more]
    assert sorted(outcome[:2] for outcome in outcomes) == [("Rejected", "no")] * 3 + [("replied", "yes")]
    assert max(outcome.seconds for outcome in outcomes if outcome.outcome == "Rejected") < 1.9
    assert sum(request.runs for request in more) == 1
    assert taken[0].result().outcome == "replied"


def test_a_handler_that_raises_has_run(cloud: Any) -> None:
    cloud.server("a")
    client = cloud.client()
    assert cloud.knows(client, 1)
    request = cloud.begin(client, fails=True)
    assert request.result()[:2] == ("RemoteError", "yes")
    assert request.runs == 1


def test_a_crash_is_heard_at_once_as_unknown(cloud: Any) -> None:
    server, client = cloud.server("a"), cloud.client()
    assert cloud.knows(client, 1)
    request = cloud.begin(client, work=3.0, timeout=30.0)
    assert cloud.has_run(request)
    cloud.crash(server)
    outcome = request.result()
    assert outcome[:2] == ("PeerLost", "unknown")
    assert outcome.seconds < 2.9


def test_a_request_that_may_have_run_stays_unknown_when_the_next_server_refuses_it(cloud: Any) -> None:
    first, _full = cloud.server("a"), cloud.server("b", workers=1, inbox_messages=1)
    client = cloud.client()
    assert cloud.knows(client, 2)
    slow = cloud.begin(client, server="b", work=2.0)
    assert cloud.has_run(slow)
    request = cloud.begin(client, work=4.0, idempotent=True)
    assert cloud.has_run(request)
    cloud.crash(first)
    assert request.result()[:2] == ("Rejected", "unknown")
    assert request.runs == 1


def test_a_draining_server_answers_what_it_took_and_new_calls_go_elsewhere(cloud: Any) -> None:
    first, _second = cloud.server("a"), cloud.server("b")
    client = cloud.client()
    assert cloud.knows(client, 2)
    slow = cloud.begin(client, server="a", work=0.5)
    assert cloud.begin(client, server="b").result().by == "b"
    assert cloud.has_run(slow)
    cloud.drain(first)
    requests = [cloud.begin(client) for _ in range(6)]
    outcomes = [request.result() for request in requests]
    # Those that were on their way when the drain began may have been taken by either.
    assert {outcome.outcome for outcome in outcomes} == {"replied"}
    assert {cloud.begin(client).result().by for _ in range(6)} == {"b"}
    assert slow.result()[:3] == ("replied", "yes", "a")


def test_a_drain_under_load_fails_no_call(cloud: Any) -> None:
    first, _second = cloud.server("a"), cloud.server("b")
    clients = [cloud.client() for _ in range(3)]
    assert all(cloud.knows(client, 2) for client in clients)
    for client in clients:
        assert {cloud.begin(client, server=name).result().outcome for name in "ab"} == {"replied"}
    requests = [cloud.begin(client, work=0.05) for client in clients * 5]
    cloud.drain(first)
    requests += [cloud.begin(client, work=0.01) for client in clients * 10]
    assert {request.result().outcome for request in requests} == {"replied"}
    assert {request.runs for request in requests} == {1}


def test_a_record_that_goes_and_comes_back_makes_no_duplicates(cloud: Any) -> None:
    server, client = cloud.server("a"), cloud.client()
    assert cloud.knows(client, 1)
    assert {cloud.begin(client).result().outcome for _ in range(5)} == {"replied"}
    cloud.vanish_and_return(server, client)
    assert {cloud.begin(client).result().outcome for _ in range(5)} == {"replied"}


@pytest.mark.parametrize("kind", [wire.REQUEST, wire.CAST])
def test_a_request_that_comes_twice_runs_once(cloud: Any, kind: int) -> None:
    server, client = cloud.server("a"), cloud.client()
    assert cloud.knows(client, 1)
    link, node = cloud.raw_link(server)
    number, body = cloud.body()
    request = wire.request(kind, 0, 1, 60.0, None, wire.names("echo", "", "work"), body)
    for frame in (wire.hello(wire.Hello(b"caller of a test", node)), request, request):
        assert cloud.wait(lambda frame=frame: link.send(frame))
    answers: list[Any] = []

    def kinds() -> list[int]:
        while link.drain(64, answers):
            pass
        return [wire.kind_of(frame) for frame, _ in answers]

    assert cloud.wait(lambda: cloud.runs_of(number) > 0 and len(kinds()) >= 2 + (kind == wire.CAST))
    assert cloud.runs_of(number) == 1
    first, *others = kinds()
    assert first == wire.HELLO
    assert {*others} == {wire.ACK} if kind == wire.CAST else wire.REPLY in others


def test_a_request_without_a_hello_is_refused(cloud: Any) -> None:
    server, client = cloud.server("a"), cloud.client()
    assert cloud.knows(client, 1)
    link, _ = cloud.raw_link(server)
    number, body = cloud.body()
    request = wire.request(wire.REQUEST, 0, 1, 60.0, None, wire.names("echo", "", "work"), body)
    assert cloud.wait(lambda: link.send(request))
    answers: list[Any] = []
    assert cloud.wait(lambda: link.drain(1, answers) or answers)
    [(frame, _)] = answers
    assert wire.header(frame).kind == wire.REJECT
    assert wire.rejection(frame)[0] == "hello first"
    assert cloud.runs_of(number) == 0

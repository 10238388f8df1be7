"""A relay, asked from outside: what it refuses, what it says, and that it needs to know nobody."""

from __future__ import annotations

from time import monotonic
from typing import Any

import pytest

from onehop import Node, Record, errors
from onehop.protocol import tree, wire
from onehop.protocol.routes import Route
from onehop.transport.blocking import run
from onehop.transport.requests import Attempt, Terms

BODY = b"\x92\x91\x07\x80"
"""The arguments of note(7)."""


@pytest.fixture
def asked(make_node: Any) -> tuple[Node, Node]:
    """A node that serves, and so relays; and one that has a view of it."""
    serving, calling = make_node(), make_node()
    serving.serve("clock", {"read": lambda: 1})
    assert calling.call("clock", "read") == 1
    return serving, calling


def ask(calling: Node, serving: Node, body: bytes, *, method: str = tree.METHOD, kind: int = wire.REQUEST) -> Any:
    """The call in which an origin asks a relay, ended well."""
    engine = calling._core()
    now = monotonic()
    attempt = Attempt(Terms(tree.SERVICE, "", 5.0, 0.0), method, now + 5.0, now)
    attempt.route = Route(engine.protocol.peers.peers[bytes.fromhex(serving.id)], tree.SERVICE, "")
    waiting = engine.send_all([(attempt, kind, 0, body)])
    while waiting:
        waiting = run(engine.send_ready(waiting))
    run(engine.conclude(attempt))
    if attempt.error is not None:
        raise attempt.error
    return attempt.call


def receiver(record: Record, server: str = "receiver") -> tree.Receiver:
    return tree.Receiver(record.node, server, record.host, record.endpoints)


def test_a_relay_passes_on_to_whom_it_is_told_and_says_whom_it_did_not_reach(asked, make_node, eventually) -> None:
    serving, calling = asked
    ran: list[int] = []
    make_node().serve("diary", {"note": ran.append}, server="receiver")
    assert calling.wait_for("diary", timeout=5.0)
    (record,) = [each for each in calling.nodes() if "diary" in each.services]
    nobody = Record(node="ab" * 16, host="h", endpoints=("ipc:///nowhere/at-all.sock",))
    body = tree.request("diary", "note", [receiver(record), receiver(nobody), receiver(record, "other")], BODY)
    told = tree.parse_receipts(ask(calling, serving, body).body, 3)
    assert [(each.outcome, each.reason) for each in told] == [("taken", ""), ("not sent", ""), ("refused", "no server")]
    assert all(0 <= each.seconds < 5 for each in told)
    assert told[0].text == ""
    assert all("diary" in each.text or "ab" * 4 in each.text for each in told[1:])
    eventually(lambda: ran == [7])
    eventually(lambda: "ab" * 16 not in {peer.node for peer in serving.statistics().peers})


def test_nobody_to_pass_on_to_is_answered_too(asked) -> None:
    serving, calling = asked
    assert tree.parse_receipts(ask(calling, serving, tree.request("clock", "read", [], BODY)).body, 0) == []


@pytest.mark.parametrize(
    ("body", "method"), [(b"nonsense", tree.METHOD), (tree.request("clock", "read", [], BODY), "other")]
)
def test_a_relay_refuses_what_it_cannot_read(asked, body: bytes, method: str) -> None:
    serving, calling = asked
    with pytest.raises(errors.Rejected) as caught:
        ask(calling, serving, body, method=method)
    assert (caught.value.reason, caught.value.executed) == ("malformed", "no")
    assert serving.statistics().refused == {"malformed": 1}
    assert serving.statistics().taken == 0


def test_a_relay_takes_no_casts(asked, eventually) -> None:
    serving, calling = asked
    ask(calling, serving, tree.request("clock", "read", [], BODY), kind=wire.CAST)  # taken in, as any cast is
    eventually(lambda: serving.statistics().refused == {"malformed": 1})


def test_a_relay_that_has_its_hands_full_refuses(asked, eventually) -> None:
    serving, calling = asked
    places = serving._core().tree._places
    taken = [places.pop() for _ in range(len(places))]
    body = tree.request("clock", "read", [], BODY)
    with pytest.raises(errors.Rejected) as caught:
        ask(calling, serving, body)
    assert (caught.value.reason, caught.value.executed) == ("full", "no")
    places.extend(taken)
    assert tree.parse_receipts(ask(calling, serving, body).body, 0) == []
    eventually(lambda: len(places) == len(taken))  # given back behind the answer


def test_an_unwilling_node_has_no_such_service(make_node) -> None:
    serving, calling = make_node(relay=False), make_node()
    serving.serve("clock", {"read": lambda: 1})
    assert calling.call("clock", "read") == 1
    with pytest.raises(errors.Rejected, match="no service"):
        ask(calling, serving, tree.request("clock", "read", [], BODY))
    assert [record.relay for record in calling.nodes()] == [False]


def test_a_relay_refuses_what_names_a_receiver_that_cannot_be(asked, eventually) -> None:
    serving, calling = asked
    strange = Record(node="cd" * 16, host="h", endpoints=("ipc:///\udcff",))
    with pytest.raises(errors.Rejected, match="malformed"):
        ask(calling, serving, tree.request("clock", "read", [receiver(strange)], BODY))
    eventually(lambda: len(serving._core().tree._places) == 8)

"""What breaks a round of receiving in the loop: it is told once, and the next round goes on."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from typing import Any

import pytest

from onehop import CallTimeout, Rejected, ResourceLimit
from onehop.protocol import wire
from onehop.testing.memory import MemoryCarrier, Network
from onehop.transport.carrier import InboundSocket


class FaultyInbound(InboundSocket):
    """An inbound end that breaks once, where it is told to."""

    def __init__(self, inner: InboundSocket) -> None:
        self.fd, self.endpoints = inner.fd, inner.endpoints
        self.breaks_at = ""
        self.send_large, self.close = inner.send_large, inner.close  # type: ignore[method-assign]
        self._inner = inner

    def _may_break(self, at: str) -> None:
        if self.breaks_at == at:
            self.breaks_at = ""
            raise OSError("out of order")

    def send(self, identity: bytes, frame: bytes) -> bool:
        if wire.kind_of(frame) == wire.REPLY:
            self._may_break("send")
        return self._inner.send(identity, frame)

    def drain(self, limit: int, into: list[Any]) -> bool:
        more = self._inner.drain(limit, into)
        if into:
            self._may_break("drain")
        return more


class FaultyCarrier(MemoryCarrier):
    """A carrier, as a program may give one, whose inbound ends may break."""

    def __init__(self) -> None:
        super().__init__()
        self.inbound: list[FaultyInbound] = []

    def bind(self, *endpoints: str) -> InboundSocket:
        self.inbound.append(FaultyInbound(super().bind(*endpoints)))
        return self.inbound[-1]


@pytest.fixture
def network() -> Network:
    made = Network()
    made.carrier = FaultyCarrier()
    return made


async def double(value: int) -> int:
    return 2 * value


@pytest.mark.parametrize(("at", "lost"), [("send", 1), ("drain", 0)])
async def test_round_that_breaks_takes_nothing_from_others_and_is_told_once(
    zmq_node: Any, network: Any, caplog: pytest.LogCaptureFixture, at: str, lost: int
) -> None:
    serving = zmq_node(network=network)
    await serving.serve("clock", {"double": double})
    client = zmq_node(network=network).client("clock", timeout=3.0)
    assert await client.call("double", 1) == 2
    (inbound,) = network.carrier.inbound
    with caplog.at_level(logging.ERROR, "onehop"):
        inbound.breaks_at = at
        found = await asyncio.gather(*(client.call("double", each) for each in range(10)), return_exceptions=True)
    answered = [each for each in found if isinstance(each, int)]
    assert len(answered) == 10 - lost
    assert all(isinstance(each, CallTimeout) and each.executed == "unknown" for each in found if each not in answered)
    what = "answers that could not be sent" if at == "send" else "rounds of receiving that broke"
    assert serving.statistics().dropped == {what: 1}
    (record,) = caplog.records
    assert record.getMessage() == f"{what}: the 1. time; it goes on"
    assert record.exc_info[0] is OSError
    assert await client.call("double", 4) == 8


@pytest.mark.parametrize("loop_kind", ["asyncio"])  # uvloop's methods cannot be replaced
async def test_connection_that_fails_half_made_leaves_nothing_watched(
    zmq_node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, calling = zmq_node(), zmq_node()
    await serving.serve("clock", {"double": double})
    assert await calling.wait_for("clock", timeout=5.0)
    loop, watched = asyncio.get_running_loop(), []
    add_reader = loop.add_reader

    def add(descriptor: int, *rest: Any) -> None:
        watched.append(descriptor)
        if len(watched) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        add_reader(descriptor, *rest)

    monkeypatch.setattr(loop, "add_reader", add)
    with pytest.raises(ResourceLimit, match=r"could be begun: .* No space left"):
        await calling.call("clock", "double", 1)
    assert [loop.remove_reader(each) for each in watched] == [False, False]
    assert await calling.call("clock", "double", 1) == 2


@pytest.mark.parametrize("loop_kind", ["asyncio"])  # uvloop does not tell
async def test_what_comes_behind_a_final_goodbye_calls_for_no_look(zmq_node: Any, until: Any) -> None:
    serving, calling = zmq_node(), zmq_node()
    await serving.serve("clock", {"double": double})
    assert await calling.call("clock", "double", 1) == 2
    (link,) = calling._engine._links.values()
    inbound = serving._engine.inbound

    def end(inbox: Any) -> None:  # as where the registry is away, and the record stays
        (identity,) = inbox.senders
        inbox.drain("drained", time.monotonic(), final=True)
        inbox.outgoing.append((identity, wire.reject(99, "draining")))

    await asyncio.to_thread(inbound.change, end)
    await until(lambda: link.drained)
    loop = asyncio.get_running_loop()
    assert loop.remove_reader(link.socket.fd) is False, "nothing waits for it"


async def test_call_whose_task_cannot_be_made_is_told_that_it_did_not_run(zmq_node: Any) -> None:
    serving = zmq_node()
    await serving.serve("clock", {"double": double})
    client = zmq_node().client("clock", timeout=20.0)
    assert await client.call("double", 1) == 2

    def refuse(*_arguments: Any, **_keywords: Any) -> Any:
        raise OSError("no tasks today")

    loop = asyncio.get_running_loop()
    loop.set_task_factory(refuse)
    try:
        with pytest.raises(Rejected, match="full") as caught:
            await client.call("double", 2)
    finally:
        loop.set_task_factory(None)
    assert caught.value.executed == "no"
    assert serving.statistics().dropped["requests whose run broke"] >= 1
    assert await client.call("double", 3) == 6

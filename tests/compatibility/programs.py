"""Small programs that every release can run: a test starts each with one release, and its counterpart with another.

    python programs.py NAME [argument...]

Each says one JSON value a line. They use nothing but what the first release has.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import onehop
import onehop.asyncio
from onehop.protocol import wire


def say(**words: Any) -> None:
    print(json.dumps(words, default=str), flush=True)


class Counts:
    """What ran, by the key it was given."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.Lock()
        self.counts: dict[str, int] = {}

    def note(self, key: str) -> int:
        with self.lock:
            self.counts[key] = self.counts.get(key, 0) + 1
            return self.counts[key]


def blocking_methods(counts: Counts) -> dict[str, Callable[..., Any]]:
    def fail(text: str) -> None:
        raise KeyError(text)

    def items(count: int) -> Any:
        yield from range(count)

    def sleep(seconds: float, key: str) -> str:
        counts.note(key)
        time.sleep(seconds)
        return "slept"

    return {
        "echo": lambda value: value,
        "name": lambda: counts.name,
        "note": counts.note,
        "ran": lambda key: counts.counts.get(key, 0),
        "fail": fail,
        "items": items,
        "sleep": sleep,
    }


def asyncio_methods(counts: Counts) -> dict[str, Callable[..., Any]]:
    async def items(count: int) -> Any:
        for number in range(count):
            yield number

    async def sleep(seconds: float, key: str) -> str:
        counts.note(key)
        await asyncio.sleep(seconds)
        return "slept"

    async def echo(value: Any) -> Any:
        return value

    return {**blocking_methods(counts), "items": items, "sleep": sleep, "echo": echo}


def serve(face: str, name: str) -> None:
    """Serve "clock" under a name until SIGTERM; says so, and at the end whether all was answered."""
    counts = Counts(name)
    if face == "blocking":
        node = onehop.Node()
        node.serve("clock", blocking_methods(counts), server=name)
        say(serving=name, release=onehop.__file__)
        say(drained=node.run())
        return

    async def main() -> None:
        looping = onehop.asyncio.Node()
        await looping.serve("clock", asyncio_methods(counts), server=name)
        say(serving=name, release=onehop.__file__)
        say(drained=await looping.run())

    asyncio.run(main())


# What a client does. Each scenario is written once, awaited; the blocking face is shown to it as if it could be. ---


class Awaited:
    """A client of the blocking face whose verbs can be awaited: each runs in a thread, as users would."""

    def __init__(self, client: onehop.Client) -> None:
        self._client = client

    def options(self, **options: Any) -> Awaited:
        return Awaited(self._client.options(**options))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: asyncio.to_thread(getattr(self._client, name), *arguments)


SCENARIOS: dict[str, Callable[..., Any]] = {}
WHO = f" of {os.getpid()}"
"""Behind each key, so that several clients do not count each other's."""


def scenario(function: Callable[..., Any]) -> Callable[..., Any]:
    SCENARIOS[function.__name__] = function
    return function


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what comes soon."""
    end = time.monotonic() + 10.0
    while not await condition():
        assert time.monotonic() < end, "it did not come true within 10 s"
        await asyncio.sleep(0.01)


@scenario
async def calls(client: Any) -> None:
    values = [None, True, 2**70, -1.5, "ü", b"\xff", [1, [2]], {"a": {"b": [3]}}]
    assert await client.call("echo", values) == values


@scenario
async def named_servers(client: Any) -> None:
    for name in ("first", "second"):
        assert {await client.options(server=name).call("name") for _ in range(4)} == {name}


@scenario
async def streams(client: Any) -> None:
    opened = await client.stream("items", 200) if isinstance(client, Awaited) else client.stream("items", 200)
    if isinstance(client, Awaited):
        assert await asyncio.to_thread(list, opened) == list(range(200))
    else:
        assert [item async for item in opened] == list(range(200))


@scenario
async def casts(client: Any) -> None:
    first = client.options(server="first")
    await first.cast("note", "cast" + WHO)
    await until(lambda: _equals(first.call("ran", "cast" + WHO), 1))


async def _equals(call: Any, expected: Any) -> bool:
    return bool(await call == expected)


@scenario
async def many_casts(client: Any) -> None:
    first = client.options(server="first")
    await first.cast_many("note", [["many" + WHO]] * 3_000)
    await until(lambda: _equals(first.call("ran", "many" + WHO), 3_000))


@scenario
async def fan_outs(client: Any) -> None:
    receipts = await client.fanout("note", "fanout" + WHO)
    assert sorted((each.server, each.outcome) for each in receipts) == [("first", "taken"), ("second", "taken")]
    for name in ("first", "second"):
        await until(lambda name=name: _equals(client.options(server=name).call("ran", "fanout" + WHO), 1))


@scenario
async def gathering(client: Any) -> None:
    found = await client.gather("name")
    assert sorted(found.replies.values()) == ["first", "second"]
    assert not found.missing
    failed = await client.gather("fail", "x")
    assert {type(each).__name__ for each in failed.errors.values()} == {"RemoteError"}


@scenario
async def large_bodies(client: Any) -> None:
    for size in (65_500, 65_536, 5_000_000):
        assert await client.call("echo", b"x" * size) == b"x" * size
    try:
        await client.call("echo", b"x" * 9_000_000)
    except onehop.TooLarge:
        return
    raise AssertionError("what is too large was sent")


@scenario
async def errors(client: Any) -> None:
    assert await _failure(client.call("fail", "why")) == ("RemoteError", "yes")
    assert await _failure(client.call("none")) == ("NoSuchMethod", "no")
    assert await _failure(client.call("echo")) == ("BadArguments", "no")
    nobody = client.options(server="nobody", ready_timeout=0.05)
    assert await _failure(nobody.call("name")) == ("NoRoute", "no")
    args: tuple[Any, ...] = ()
    try:
        await client.options(errors=(KeyError,)).call("fail", "why")
    except KeyError as error:
        args = error.args
    assert args == ("why",)


async def _failure(call: Any) -> tuple[str, str]:
    try:
        await call
    except onehop.CallError as error:
        return type(error).__name__, error.executed
    return "", ""


@scenario
async def deadlines(client: Any) -> None:
    began = time.monotonic()
    assert await _failure(client.options(timeout=0.3).call("sleep", 5.0, "deadline" + WHO)) == (
        "CallTimeout",
        "unknown",
    )
    assert 0.2 < time.monotonic() - began < 3.0


@scenario
async def monitored_calls(client: Any) -> None:
    """The handler takes longer than the interval: without signs of life the call would end."""
    assert await client.options(monitor=1.5).call("sleep", 2.5, "monitored" + WHO) == "slept"


@scenario
async def cancellation(client: Any) -> None:
    first = client.options(server="first")
    call = await first.start("sleep", 2.0, "cancelled" + WHO)
    await until(lambda: _equals(first.call("ran", "cancelled" + WHO), 1))
    assert call.cancel()
    try:
        await (asyncio.to_thread(call.result) if isinstance(client, Awaited) else call.result())
    except onehop.CallCancelled:
        return
    raise AssertionError("it was not cancelled")


@scenario
async def signs_of_life(client: Any) -> None:
    assert [each.outcome for each in await client.ping()] == ["taken", "taken"]


def client(face: str) -> None:
    """Run all scenarios against the servers "first" and "second"; says what came of each."""

    async def run_all(service: Any) -> None:
        for name, steps in SCENARIOS.items():
            try:
                await asyncio.wait_for(steps(service), 30.0)
                say(scenario=name, outcome="ok")
            except Exception:
                say(scenario=name, outcome=traceback.format_exc())
        say(scenario="", outcome="ended", release=onehop.__file__)

    async def blocking() -> None:
        with onehop.Node(ready_timeout=10.0) as node:
            await asyncio.to_thread(node.wait_for, "clock", count=2, timeout=20.0)
            await run_all(Awaited(node.client("clock", timeout=20.0)))

    async def looping() -> None:
        async with onehop.asyncio.Node(ready_timeout=10.0) as node:
            assert await node.wait_for("clock", count=2, timeout=20.0)
            await run_all(node.client("clock", timeout=20.0))

    asyncio.run(blocking() if face == "blocking" else looping())


def caller() -> None:
    """Call, as lines on standard input say; for what happens while a server drains.

    "begin SECONDS KEY" begins a call, "end" waits for it, "call METHOD" calls at once, within a second.
    """
    node = onehop.Node(ready_timeout=0.2)
    node.wait_for("clock", timeout=20.0)
    service = node.client("clock", timeout=10.0)
    begun: Any = None
    say(ready=True)
    for line in sys.stdin:
        match line.split():
            case ["begin", seconds, key]:
                begun = service.start("sleep", float(seconds), key)
                say(begun=True)
            case ["ran", key]:
                say(ran=service.call("ran", key))
            case ["end"]:
                say(result=begun.result())
            case ["call"]:
                try:
                    say(result=service.call("name"))
                except onehop.CallError as error:
                    say(error=type(error).__name__, executed=error.executed)


# Bare sockets: what no client of ours sends on its own. ------------------------------------------------


class Bare:
    """A connection to the server of "clock", on which the bytes are ours."""

    def __init__(self, node: onehop.Node) -> None:
        import zmq

        node.wait_for("clock", timeout=20.0)
        [record] = [each for each in node.nodes() if "clock" in each.services]
        self.context: Any = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(record.endpoints[0])

    def say(self, *frames: bytes) -> None:
        for each in frames:
            self.socket.send(each)

    def hear(self) -> bytes:
        return bytes(self.socket.recv())

    def close(self) -> None:
        self.socket.close()
        self.context.term()


def _address(method: str) -> bytes:
    return wire.names("clock", "", method)


def _cast(number: int, body: bytes) -> bytes:
    frame = wire.request(wire.CAST, 0, number, 10.0, None, _address("note"), body)
    assert isinstance(frame, bytes)
    return frame


def strange() -> None:
    """Say the same twice, and what only a later release may say; says what came of it."""
    node = onehop.Node(ready_timeout=10.0)
    service = node.client("clock", timeout=10.0)
    later = wire.hello(wire.Hello(b"l" * 16, bytes(16), version=9, oldest=9))
    bare = Bare(node)
    bare.say(later)
    answer = wire.parse_hello(bare.hear())
    bare.say(_cast(1, b"\x92\x91\xa5later\x80"))
    refused = wire.rejection(bare.hear())[0]
    bare.close()

    bare = Bare(node)
    both = wire.hello(wire.Hello(b"b" * 16, bytes(16), version=9, oldest=1, features=0x8000_0001)) + b"and more fields"
    bare.say(both)
    agreed = wire.parse_hello(bare.hear())
    unknown = [wire.pack(kind, 0, number=7, id=1) + b"what is this" for kind in (8, 15, 22, 200)]
    twice = _cast(1, b"\x92\x91\xa5twice\x80")
    bare.say(*unknown, twice, twice)
    acks = [wire.acked(bare.hear()) for _ in range(2)]
    bare.close()
    ends = time.monotonic() + 10.0
    while not service.call("ran", "twice") and time.monotonic() < ends:
        time.sleep(0.01)
    say(
        mismatched=[answer.oldest, answer.version],
        refused=refused,
        later=service.call("ran", "later"),
        agreed=[agreed.oldest, agreed.version],
        acks=acks,
        twice=service.call("ran", "twice"),
    )


# The driver of oslo.messaging ------------------------------------------------------------------------------


def _oslo() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import oslo_messaging
    from oslo_config import cfg

    registry = onehop.Node().settings.registry
    url = "zmq://" if registry == "local" else "zmq+" + registry
    return oslo_messaging, oslo_messaging.get_rpc_transport(cfg.ConfigOpts(), url)


class Endpoint:
    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def echo(self, context: Any, value: Any) -> Any:
        return value

    def who(self, context: Any) -> str:
        return self.counts.name

    def note(self, context: Any, key: str) -> None:
        self.counts.note(key)

    def ran(self, context: Any, key: str) -> int:
        return self.counts.counts.get(key, 0)

    def fail(self, context: Any) -> None:
        raise ValueError("as asked")

    def sleep(self, context: Any, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"


def oslo_serve(name: str) -> None:
    """Serve topic "compute" through oslo.messaging until a line comes."""
    messaging, transport = _oslo()
    target = messaging.Target(topic="compute", server=name)
    server = messaging.get_rpc_server(transport, target, [Endpoint(Counts(name))])
    server.start()
    say(serving=name, release=onehop.__file__)
    sys.stdin.readline()
    server.stop()
    server.wait()
    transport.cleanup()
    say(stopped=True)


def oslo_client() -> None:
    """All that a client of oslo.messaging does with the servers "first" and "second"; says what came of it."""
    messaging, transport = _oslo()
    compute = messaging.get_rpc_client(transport, messaging.Target(topic="compute"), timeout=15)
    found: dict[str, Any] = {"echo": compute.call({}, "echo", value={"list": [1, "ü"], "none": None})}
    found["large"] = len(compute.call({}, "echo", value="x" * 2_000_000))
    for name in ("first", "second"):
        found[name] = compute.prepare(server=name).call({}, "who")
    compute.prepare(server="first").cast({}, "note", key="cast")
    compute.prepare(fanout=True).cast({}, "note", key="fanout")
    end = time.monotonic() + 10.0

    def counts() -> list[int]:
        first, second = (compute.prepare(server=name) for name in ("first", "second"))
        return [first.call({}, "ran", key="cast"), *(each.call({}, "ran", key="fanout") for each in (first, second))]

    while counts() != [1, 1, 1] and time.monotonic() < end:
        time.sleep(0.01)
    found["ran"] = counts()
    try:
        compute.call({}, "fail")
    except ValueError as error:  # made anew, as oslo.messaging has it for what is built in
        found["error"] = type(error).__name__
    try:
        compute.prepare(timeout=0.4).call({}, "sleep", seconds=3.0)
    except messaging.MessagingTimeout:
        found["late"] = True
    monitored = compute.prepare(timeout=10, call_monitor_timeout=2)
    found["monitored"] = monitored.call({}, "sleep", seconds=3.0)
    say(**found)


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    globals()[sys.argv[1]](*sys.argv[2:])

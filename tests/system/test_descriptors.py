"""What a node has opened is closed when it is closed, without a collection of garbage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from tests.registry.servers import Redis, free_port

ROUNDS = """
import asyncio, collections, gc, subprocess
import onehop.asyncio

gc.disable()
SETTINGS = {"timeout": 20.0, "ready_timeout": 20.0}
if len(sys.argv) > 1:
    SETTINGS |= {"registry": sys.argv[1], "ports": sys.argv[2], "insecure": True, "address": "127.0.0.1"}

def opened():
    found = collections.Counter()
    for each in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{each}").partition(":[")[0]] += 1
        except FileNotFoundError:  # the listing's own
            pass
    return found

def peer(name):
    "A process that serves, until it is killed."
    source = f'''
import onehop
node = onehop.Node(**{SETTINGS!r})
node.serve("clock", {{"name": lambda: "{name}", "items": lambda: iter(range(100))}}, server="{name}")
print("serving", flush=True)
node.run()
'''
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "serving\\n"
    return process

def flat(one_round, rounds=3):
    "Whether no descriptor more is open after some rounds than after one."
    one_round()
    before, until = opened(), time.monotonic() + 20.0
    for _ in range(rounds):
        one_round()
    while (after := opened()).total() > before.total() and time.monotonic() < until:
        time.sleep(0.01)  # libzmq closes a socket in a thread of its own
    return "flat" if after.total() <= before.total() else f"more: {after - before}"
"""

BLOCKING = """
def one_round():
    server, client = onehop.Node(**SETTINGS), onehop.Node(**SETTINGS)
    server.serve("clock", {"name": lambda: "mine"}, server="mine", workers=2)
    assert client.call("clock", "name") == "mine"
    crowd = [threading.Thread(target=client.call, args=("clock", "name")) for _ in range(8)]
    for action in (threading.Thread.start, threading.Thread.join):
        for each in crowd:
            action(each)
    client.cast("clock", "name")
    with peer("other") as process:
        other = client.client("clock", server="other")
        assert other.call("name") == "other"
        stream = other.stream("items")
        next(stream)
        process.kill()
    try:
        other.options(ready_timeout=0.0).call("name")
    except onehop.CallError:
        pass
    client.close()
    server.close()

print(flat(one_round), flush=True)
"""

ASYNCIO = """
async def steps():
    server, client = onehop.asyncio.Node(**SETTINGS), onehop.asyncio.Node(**SETTINGS)

    async def later():
        await asyncio.sleep(0.0)

    await server.serve("clock", {"name": lambda: "mine", "later": later}, server="mine", workers=2)
    assert await client.call("clock", "name") == "mine"
    await asyncio.gather(*(client.call("clock", "later") for _ in range(8)))
    await client.cast("clock", "later")
    with peer("other") as process:
        other = client.client("clock", server="other")
        assert await other.call("name") == "other"
        stream = other.stream("items")
        await anext(stream)
        process.kill()
    try:
        await other.options(ready_timeout=0.0).call("name")
    except onehop.CallError:
        pass
    await client.close()
    await server.close()

print(flat(lambda: asyncio.run(steps())), flush=True)
"""

ENDED_LINKS = """
client = onehop.Node(**SETTINGS)

def one_round():
    server = onehop.Node(**SETTINGS)
    server.serve("clock", {"name": lambda: "mine"})
    assert client.call("clock", "name") == "mine"
    server.close()
    while client.servers("clock"):
        time.sleep(0.01)

print(flat(one_round), flush=True)
client.close()
"""

NO_BEGINNING = """
os.environ["ONEHOP_RUN_DIRECTORY"] = "/dev/null/none"
node = onehop.Node()

def one_round():
    try:
        node.call("clock", "name")
    except onehop.OnehopError:
        return
    raise AssertionError("it began")

print(flat(one_round), flush=True)
"""


@pytest.mark.parametrize("registry", ["local", "hosts", "redis"])
@pytest.mark.parametrize("rounds", [pytest.param(BLOCKING, id="blocking"), pytest.param(ASYNCIO, id="asyncio")])
def test_closed_node_leaves_no_descriptor_behind(start: Callable[..., Any], registry: str, rounds: str) -> None:
    with ExitStack() as stack:
        arguments: tuple[str, ...] = ()
        if registry != "local":
            first = free_port()
            url = stack.enter_context(Redis()).url() if registry == "redis" else f"hosts://127.0.0.1:{free_port()}/"
            arguments = (url, f"{first}-{first + 9}")
        assert start(ROUNDS + rounds, *arguments).line() == "flat"


def test_link_that_ended_leaves_no_descriptor_behind_while_its_node_goes_on(start: Callable[..., Any]) -> None:
    assert start(ROUNDS + ENDED_LINKS).line() == "flat"


def test_node_that_cannot_begin_leaves_no_descriptor_behind(start: Callable[..., Any]) -> None:
    assert start(ROUNDS + NO_BEGINNING).line() == "flat"

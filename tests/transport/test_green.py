"""Where ``select.poll`` is gone, and where a program is patched for green threads, before or after it makes its
nodes. (A patch under threads that are at work is beyond what the patching library itself supports.)"""

from __future__ import annotations

import subprocess
import sys

import pytest

USE = """
def use(node, own):
    given_up = threading.Event()
    own.serve("inner", {"echo": lambda value: value, "count": lambda items: iter(range(items)),
                        "note": taken.append, "slow": lambda: time.sleep(0.3), "held": lambda: given_up.wait(20)})
    client = node.client("inner", timeout=20.0)
    assert client.call("echo", 5) == 5
    client.cast("note", 1)
    assert list(client.stream("count", 100)) == list(range(100))
    calls = [client.start("slow") for _ in range(4)]
    assert [call.result() for call in calls] == [None] * 4
    assert [each.outcome for each in client.fanout("note", 2)] == ["taken"]
    assert list(client.gather("echo", 3).replies.values()) == [3]
    results = []
    threads = [threading.Thread(target=lambda n=n: results.append([client.call("echo", (n, i)) for i in range(50)]))
               for n in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(results) == [[[n, i] for i in range(50)] for n in range(8)], results
    try:
        client.options(timeout=0.1).call("held")
        raise AssertionError("no timeout")
    except onehop.CallTimeout:
        given_up.set()
    listener = own.listen("polled")
    answering = threading.Thread(target=lambda: [listener.poll(timeout=10)[0].reply_raw(b"\\x05") for _ in range(20)])
    answering.start()
    assert [node.client("polled", timeout=10.0).call("x") for _ in range(20)] == [5] * 20
    answering.join()
    assert listener.poll(timeout=0.05) == []
    listener.stop()
    until = time.monotonic() + 5
    while len(taken) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(taken) == [1, 2], taken

taken = []
"""

NO_POLL = """
import select
del select.poll, select.epoll
import threading, time
import onehop
{use}
own, node = onehop.Node(), onehop.Node()
use(node, own)
node.close()
own.close()
print("done")
"""

LOST_POLL = """
import select, threading, time
import onehop
{use}
own, node = onehop.Node(), onehop.Node()
own.serve("early", {{"echo": lambda value: value}})
assert node.call("early", "echo", 1) == 1
del select.poll, select.epoll
assert node.call("early", "echo", 2) == 2
use(node, own)
node.close()
own.close()
print("done")
"""

PATCHED = """
import warnings
warnings.simplefilter("ignore")
import eventlet
eventlet.monkey_patch()
import threading, time
import onehop
{use}
ticks = []

def tick():
    while True:
        ticks.append(time.monotonic())
        eventlet.sleep(0.02)

eventlet.spawn(tick)
own, node = onehop.Node(), onehop.Node()
use(node, own)
gaps = [after - before for before, after in zip(ticks, ticks[1:])]
assert max(gaps) < 1.5, max(gaps)     # the hub was never blocked by a wait of ours
assert len(ticks) > 10
node.close()
own.close()
print("done")
"""

PATCHED_LATE = """
import warnings
warnings.simplefilter("ignore")
import threading, time
import onehop
{use}
own, node = onehop.Node(), onehop.Node()
client = node.client("early")
import eventlet
eventlet.monkey_patch()
import threading, time
own.serve("early", {{"echo": lambda value: value}})
assert client.call("echo", 1) == 1
use(node, own)
node.close()
own.close()
print("done")
"""

PATCHED_AFTER_IMPORT = """
import warnings
warnings.simplefilter("ignore")
import threading, time
import onehop
{use}
own, node = onehop.Node(), onehop.Node()
client = node.client("inner")
import eventlet
eventlet.monkey_patch()
import threading, time
use(node, own)
node.close()
own.close()
print("done")
"""

POISONED = """
import sys
sys.modules["eventlet"] = None
sys.modules["gevent"] = None
import threading, time
import onehop
{use}
own, node = onehop.Node(), onehop.Node()
use(node, own)
node.close()
own.close()
print("done")
"""


PROGRAMS = {
    "no-poll": NO_POLL,
    "poll-removed-late": LOST_POLL,
    "patched": PATCHED,
    "patched-after-import": PATCHED_AFTER_IMPORT,
    "patched-after-use": PATCHED_LATE,
    "poisoned": POISONED,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_verb_works(program: str) -> None:
    source = PROGRAMS[program].replace("{use}", USE).replace("{{", "{").replace("}}", "}")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stdout + done.stderr

"""A fan-out to a thousand receivers of which ten are dead: how soon its receipts are there, and whom they name.

In the tests with fewer; the long form::

    python tests/system/wide.py --receivers 1000

The ten are stopped (SIGSTOP), killed while the registry still lists them, and without power. It makes test hosts, and
needs root.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.system.beyond import Program, Registry, beyond

from onehop.testing.hosts import Hosts

DEAD = 10
WITHIN = 7.0  # seconds
PORTS_FROM = 9501
ALIVE_LEASE = "30"  # seconds, as docs/topics/sizing.md says for so many

RECEIVERS = """
# so many nodes that serve "wide", in one loop; what the name of each begins with, how many
name, count = sys.argv[1], int(sys.argv[2])
import asyncio
from onehop.asyncio import Node

async def take(what):
    pass

async def begin(number):
    async with few:  # each waits for the registry
        node = Node(drain_timeout=1.0, relay=False)
        await node.serve("wide", {"take": take}, server=f"{name}-{number}")
        return node

async def main():
    nodes = await asyncio.gather(*map(begin, range(count)))
    say(serving=len(nodes))
    await asyncio.to_thread(sys.stdin.readline)
    os._exit(0)

sys.setswitchinterval(0.05)  # a thread of each node waits for one interpreter
few = asyncio.Semaphore(16)
asyncio.run(main())
"""

ORIGIN = """
# waits until so many serve "wide", then fans out once for each line
node = onehop.Node(ready_timeout=10.0)
assert node.wait_for("wide", count=int(sys.argv[1]), timeout=60.0)
held = [0.0]

def swing():  # how long the machine holds this process up
    while True:
        before = time.monotonic()
        time.sleep(0.1)
        held[0] = max(held[0], time.monotonic() - before - 0.1)

threading.Thread(target=swing, daemon=True).start()
say(ready=True)
for line in sys.stdin:
    if line.strip():
        node.wait_for("wide", count=int(line), timeout=30.0)
    held[0] = 0.0
    cpu, began = time.process_time(), time.monotonic()
    receipts = node.fanout("wide", "take", "x" * 2000)
    seconds = time.monotonic() - began
    say(
        seconds=seconds, held=held[0], cpu=time.process_time() - cpu,
        taken=sum(each.outcome == "taken" for each in receipts),
        others=sorted(each.server for each in receipts if each.outcome != "taken"),
        reasons=sorted({each.reason.split(": ")[-1] for each in receipts if each.outcome != "taken"})[:3],
    )
"""


def wide(hosts: Hosts, registry: Registry, receivers: int, processes: int = 8) -> dict[str, dict[str, Any]]:
    """What each way to die makes of a fan-out over warm connections.

    Returns:
        For "nobody" and each way: seconds until all receipts were there, for how long at once the machine held the
        origin up meanwhile, its CPU seconds, how many took it, whether those who did not are named and are the dead
        ones.
    """
    alive = receivers - DEAD
    shares = [alive // processes + (number < alive % processes) for number in range(processes)]
    crowd = []
    for number, share in enumerate(shares):
        first = PORTS_FROM + number * (shares[0] + 1)  # of its own: to find a free one among those of all takes long
        ports, name = f"{first}-{first + share}", f"alive-{number}"
        crowd.append(Program(hosts[1], registry.url, RECEIVERS, name, str(share), ports=ports, lease=ALIVE_LEASE))

    def dying(name: str) -> Program:
        return Program(hosts[2], registry.url, RECEIVERS, name, str(DEAD))

    victims = dying("stopped")
    for each in [*crowd, victims]:
        each.hear()
    origin = Program(hosts[3], registry.url, ORIGIN, str(receivers))
    origin.hear()

    def warm() -> None:
        until = time.monotonic() + 60.0  # no figure: until the dead are forgotten, and the new ones known
        while (said := origin.ask(str(receivers)))["taken"] != receivers or said["others"]:
            assert time.monotonic() < until, "not all receivers can be reached"

    def ask(name: str) -> dict[str, Any]:
        said = origin.ask()
        expected = sorted(f"{name}-{number}" for number in range(DEAD)) if name else []
        return {
            "seconds": said["seconds"],
            "held": said["held"],
            "CPU": said["cpu"],
            "taken": said["taken"],
            "named": said["others"] == expected,
            "reasons": said["reasons"],
        }

    warm()
    found = {"nobody": ask("")}
    victims.process.send_signal(signal.SIGSTOP)
    found["stopped"] = ask("stopped")
    victims.process.send_signal(signal.SIGCONT)
    victims.kill()
    victims = dying("killed")
    victims.hear()
    warm()
    victims.kill()
    found["killed"] = ask("killed")
    dying("powerless").hear()
    warm()
    hosts.power_off(hosts[2])
    found["powerless"] = ask("powerless")
    return found


def broken(found: dict[str, dict[str, Any]], receivers: int) -> list[str]:
    """What of :func:`wide`'s figures is not as promised."""
    wrong: list[str] = []
    for name, each in found.items():
        if not each["named"]:
            wrong.append(f"{name}: not the dead ones, and only they, are named")
        alive = receivers - (0 if name == "nobody" else DEAD)
        if each["taken"] != alive:
            wrong.append(f"{name}: {each['taken']} of {alive} took it")
        if not each["seconds"] < WITHIN + each["held"]:
            wrong.append(f"{name}: the receipts were there after {each['seconds']:.1f} s only")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receivers", type=int, default=1_000)
    parser.add_argument("--processes", type=int, default=8)
    given = parser.parse_args()
    with beyond("redis") as (hosts, registry):
        found = wide(hosts, registry, given.receivers, given.processes)
    print(json.dumps(found, indent=1))
    sys.exit("\n".join(broken(found, given.receivers)) or None)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()

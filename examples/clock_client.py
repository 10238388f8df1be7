"""A client of clock_server.py: every way to call, and what can go wrong."""

from datetime import UTC, datetime

import onehop

with onehop.Node(timeout=5.0) as node:
    print("call:", node.call("clock", "read"))
    print("with an argument:", node.call("clock", "read", at=datetime(2025, 1, 1, tzinfo=UTC)))

    clock = node.client("clock", timeout=2.0)
    print("by attribute:", clock.proxy.ping())
    clock.cast("set", "noon")  # returns when the server has taken it in
    print("to every server:", [(receipt.server, receipt.outcome) for receipt in clock.fanout("set", "midnight")])
    print("asked every server:", list(clock.gather("ping").replies.values()))

    begun = clock.start("sleep", 60)
    print("given up:", begun.cancel())

    for what, try_it in {
        "deadline": lambda: clock.options(timeout=0.3).call("sleep", 60),
        "no such method": lambda: clock.call("reed"),
        "wrong argument": lambda: clock.call("read", at="noon"),
        "nobody there": lambda: node.call("sundial", "read"),
    }.items():
        try:
            try_it()
        except onehop.CallError as error:
            print(f"{what}: {type(error).__name__}, executed={error.executed}: {error}")

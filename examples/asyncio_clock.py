"""Both ends in one asyncio loop: coroutines as handlers, many calls at once, a stream, and a task that gives up."""

import asyncio
from collections.abc import AsyncIterator

from onehop.asyncio import Node


class Clock:
    """Its coroutines run as tasks of the loop; a plain method would run in a thread."""

    async def sleep(self, seconds: float) -> float:
        """Is cancelled when its caller gives up, or is gone."""
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            print("the caller of sleep gave up")
            raise
        return seconds

    async def ticks(self, number: int) -> AsyncIterator[int]:
        """For streams: never more than the reader's credit ahead."""
        for tick in range(number):
            yield tick


async def main() -> None:
    async with Node() as server, Node() as node:
        await server.serve("clock", Clock())
        clock = node.client("clock", timeout=5.0)
        print("side by side:", await asyncio.gather(*(clock.call("sleep", n / 100) for n in range(3))))
        print("ticks:", [tick async for tick in clock.stream("ticks", 3)])
        try:
            async with asyncio.timeout(0.2):
                await clock.call("sleep", 60)
        except TimeoutError:
            print("given up")
        await server.drain()


asyncio.run(main())

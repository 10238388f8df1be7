"""A server: python clock_server.py, then clock_client.py in another terminal. Ctrl-C ends it."""

import time
from datetime import UTC, datetime

import onehop


class Clock:
    """Its public methods are what can be called."""

    def read(self, at: datetime | None = None) -> dict[str, object]:
        """The time as text and as a number; an annotated argument arrives as the type it is annotated with."""
        moment = at or datetime.now(UTC)
        return {"text": f"{moment:%H:%M:%S}", "seconds": moment.timestamp()}

    @onehop.method(inline=True, idempotent=True)
    def ping(self) -> str:
        """Answers at once, so that no thread of the pool is needed; may be asked again when an answer is lost."""
        return "pong"

    def sleep(self, seconds: float) -> float:
        """Works for a while; gives up early when nobody waits any more."""
        end = time.monotonic() + seconds
        request = onehop.current()
        while time.monotonic() < end and not (request and request.cancelled):
            time.sleep(0.05)
        return seconds

    def set(self, value: str) -> None:
        """For casts: nobody waits for what it returns."""
        print("set to", value, flush=True)


if __name__ == "__main__":
    server = onehop.Node().serve("clock", Clock())
    print("serving", server.service, "as", server.name, flush=True)
    server.run()  # until Ctrl-C or SIGTERM; then it refuses what is new and finishes what was taken

"""Items as they are produced: a slow reader holds the writer, and a reader that stops is noticed."""

from collections.abc import Iterator

import onehop


class Log:
    """A service whose method yields."""

    def __init__(self) -> None:
        self.produced = 0

    def lines(self, start: int = 0) -> Iterator[str]:
        """Without an end; `finally` runs when the reader has had enough."""
        try:
            number = start
            while True:
                self.produced += 1
                yield f"line {number}"
                number += 1
        finally:
            print("the reader left", flush=True)


log = Log()
with onehop.Node() as server, onehop.Node(stream_credit=4) as node:
    server.serve("log", log)
    with node.stream("log", "lines", start=7) as lines:
        for line in lines:
            print(line)
            if line == "line 9":
                break
    server.drain()
    print("never more than the credit ahead:", log.produced <= 3 + 4 + 1)

"""Lines over a connection of this host: how much waits for a slow reader."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from onehop.registry.lines import ALIVE, BACKLOG_LIMIT, Fault, Line


@pytest.fixture
def line() -> Iterator[Line]:
    """To a reader who reads nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as reader:
        reader.setblocking(False)
        connection, _ = server.accept()
        with closing(Line(connection, selectors.DefaultSelector(), None, 1)) as line:
            yield line


def fill(line: Line, lines: int, size: int) -> None:
    for _ in range(lines):
        line.send(b"x" * size)


@pytest.mark.parametrize("before", [b"", b"x" * BACKLOG_LIMIT], ids=["nothing", "less than may wait"])
def test_one_line_may_be_of_any_length_and_more_than_that_may_wait(line: Line, before: bytes) -> None:
    if before:
        line.send(before)
    line.send(b"x" * 3 * BACKLOG_LIMIT)
    line.send(ALIVE)
    with pytest.raises(Fault, match="reads too slowly"):
        fill(line, 4, BACKLOG_LIMIT // 2)


def test_many_lines_that_wait_are_too_many(line: Line) -> None:
    with pytest.raises(Fault, match="reads too slowly"):
        fill(line, 40, BACKLOG_LIMIT // 4)  # the system takes some of them

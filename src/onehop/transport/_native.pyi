# What `_native.c` promises. It is there where a C compiler was when onehop was installed.
#
# A socket is its address (`Socket.underlying` of pyzmq). Whoever passes one keeps it open and to one thread while the
# call lasts. Nothing here waits for ZeroMQ, and only a wait releases the GIL. What libzmq refuses is an OSError with
# its number and its words, as ENOTSOCK for a socket that was closed.

from onehop.protocol.wire import Body

# Use the libzmq that the library at `path` uses: the file of pyzmq's backend. Comes before everything else. Raises
# ImportError when that file is not loaded, or does not lead to a libzmq.
def bind(path: str, /) -> None: ...

# Hand over a message of one frame; False when there is no room (or no connection) at the moment.
def send(socket: int, frame: bytes, /) -> bool: ...

# The same from a ROUTER to one of its connections. ConnectionResetError: it has ended.
def send_to(socket: int, identity: bytes, frame: bytes, /) -> bool: ...

# Append what has arrived, at most `limit` messages, as (frame, large body or None). The body is read-only and not a
# copy; it stays when the socket goes. The frame is empty where a message had more than two. Returns whether `limit`
# ended it, so that more may be there. What was appended before an error stays.
def drain(socket: int, limit: int, into: list[tuple[bytes, Body | None]], /) -> bool: ...

# The same for a ROUTER, as (identity, frame, large body or None).
def drain_from(socket: int, limit: int, into: list[tuple[bytes, bytes, Body | None]], /) -> bool: ...

# Sleep until a descriptor is readable (or broken), at most `milliseconds`, or for ever if negative. Returns the sum of
# 1, for `fd`, and 2, for the eventfd `wake`, which is read. A descriptor of -1 is not looked at. Signal handlers run;
# the wait then goes on for the rest of its time, unless one raised.
def wait(fd: int, wake: int, milliseconds: int, /) -> int: ...

# Wait once for a message to a ROUTER and append it to `into`, if one came. Returns False where one was there already.
# The arguments are those of `wait` and of `drain`.
def receive_from(
    socket: int, fd: int, wake: int, milliseconds: int, into: list[tuple[bytes, bytes, Body | None]], /
) -> bool: ...

# Send from a DEALER, then wait once for a message and append it to `into`, if one came. Returns whether the frame was
# taken; where there was no room for it nothing else was done. The arguments are those of `send`, `wait` and `drain`.
def exchange(
    socket: int, frame: bytes, fd: int, wake: int, milliseconds: int, into: list[tuple[bytes, Body | None]], /
) -> bool: ...

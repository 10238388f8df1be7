"""What a caller is told when a handler fails, and what it may conclude."""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import pytest

from onehop import (
    BadArguments,
    CallError,
    EncodeError,
    NoRoute,
    NoSuchMethod,
    PayloadError,
    Rejected,
    RemoteError,
    SettingsError,
    TooLarge,
)


class Refused(Exception):
    """A user's own error, as both sides know it."""


class Particular(Exception):
    """Its constructor takes other things than its arguments say."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def fail(error: BaseException) -> Any:
    def handler() -> None:
        raise error

    return handler


def remote_error(client: Any, method: str, *arguments: Any) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        client.call(method, *arguments)
    return caught.value


def test_remote_error_carries_type_module_message_and_traceback(node) -> None:
    node().serve("clock", {"read": fail(ValueError("no such zone", 5))})
    error = remote_error(node().client("clock"), "read")
    assert (error.type, error.module, error.executed) == ("ValueError", "builtins", "yes")
    assert error.detail == "('no such zone', 5)"
    assert error.arguments == ("no such zone", 5)
    assert "Traceback (most recent call last)" in error.trace
    assert "in handler" in error.trace
    assert "'read' of service 'clock'" in str(error)
    assert "raised ValueError: ('no such zone', 5)" in str(error)


def test_error_of_an_allowed_class_is_raised_as_itself(node) -> None:
    node().serve("clock", {"read": fail(Refused("closed on sundays", 7))})
    client = node().client("clock", errors=(KeyError, Refused))
    with pytest.raises(Refused) as caught:
        client.call("read")
    assert caught.value.args == ("closed on sundays", 7)
    assert caught.value.executed == "yes"  # type: ignore[attr-defined]
    assert isinstance(caught.value.__cause__, RemoteError)
    assert "in handler" in caught.value.__cause__.trace


def test_error_of_a_class_that_is_not_allowed_stays_remote(node) -> None:
    node().serve("clock", {"read": fail(Refused("no"))})
    error = remote_error(node().client("clock", errors=(KeyError,)), "read")
    assert error.type == "Refused"
    assert error.module == __name__


def test_class_of_the_same_name_in_another_module_is_not_taken_for_it(node) -> None:
    Other = type("Refused", (Exception,), {"__module__": "elsewhere"})  # noqa: N806
    node().serve("clock", {"read": fail(Refused("no"))})
    assert remote_error(node().client("clock", errors=(Other,)), "read").type == "Refused"


def test_error_whose_constructor_wants_something_else_stays_remote(node) -> None:
    node().serve("clock", {"read": fail(Particular(5, reason="late"))})
    error = remote_error(node().client("clock", errors=(Particular,)), "read")
    assert (error.type, error.detail) == ("Particular", "5: late")


def test_error_whose_arguments_have_no_form_still_arrives(node) -> None:
    node().serve("clock", {"read": fail(Refused(object()))})
    client = node().client("clock")
    error = remote_error(client, "read")
    assert error.type == "Refused"
    assert error.arguments == ()
    with pytest.raises(Refused, match="<object object at"):
        client.options(errors=(Refused,)).call("read")


def test_error_that_cannot_be_told_still_arrives(node) -> None:
    node().serve("clock", {"read": fail(Unspeakable())})
    error = remote_error(node().client("clock"), "read")
    assert error.type == "Unspeakable"
    assert "its message cannot be made" in error.detail


def test_error_with_broken_text_still_arrives(node) -> None:
    node().serve("clock", {"read": fail(ValueError("\udc80"))})
    assert remote_error(node().client("clock"), "read").type == "ValueError"


def test_error_of_any_size_arrives_cut_to_what_a_message_may_have(node) -> None:
    node(max_message=100_000).serve("clock", {"read": fail(ValueError("x" * 10_000_000)), "echo": lambda: 1})
    client = node(max_message=100_000).client("clock")
    error = remote_error(client, "read")
    assert error.type == "ValueError"
    assert len(error.detail) <= 100_000
    assert client.call("echo") == 1


@pytest.mark.parametrize("workers", [1, 4])
def test_handler_that_exits_fails_its_call_and_no_other(node, workers) -> None:
    node().serve("clock", {"exit": lambda: sys.exit(3), "read": lambda: 1}, workers=workers)
    client = node().client("clock", timeout=5.0)
    for _ in range(workers + 1):
        error = remote_error(client, "exit")
        assert (error.type, error.executed) == ("SystemExit", "yes")
    assert client.call("read") == 1


def test_missing_method_is_told_with_those_there_are(node) -> None:
    node().serve("clock", {"read": lambda: 1, "set": lambda: 1})
    with pytest.raises(NoSuchMethod, match="it has read, set") as caught:
        node().call("clock", "raed")
    assert caught.value.executed == "no"
    assert "'raed' of service 'clock'" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "keywords"), [((), {}), ((1, 2, 3), {}), ((1,), {"zoen": "utc"}), ((1,), {"a": 1})]
)
def test_arguments_that_do_not_fit_are_told_and_nothing_runs(node, arguments, keywords) -> None:
    ran = []
    node().serve("clock", {"read": lambda a, zone="": ran.append(a)})
    with pytest.raises(BadArguments, match="takes other arguments") as caught:
        node().call("clock", "read", *arguments, **keywords)
    assert caught.value.executed == "no"
    assert ran == []


def test_type_error_inside_the_handler_is_the_handlers_own(node) -> None:
    def read() -> None:
        len(5)  # type: ignore[arg-type]

    node().serve("clock", {"read": read})
    error = remote_error(node().client("clock"), "read")
    assert not isinstance(error, BadArguments)
    assert (error.type, error.executed) == ("TypeError", "yes")


def test_argument_of_the_wrong_type_is_told_by_name(node) -> None:
    def read(count: int, zone: str = "") -> None:
        raise AssertionError("it must not run")

    node().serve("clock", {"read": read})
    client = node().client("clock")
    with pytest.raises(BadArguments, match=r"argument 1: Expected `int`, got `str`") as caught:
        client.call("read", "five")
    assert caught.value.executed == "no"
    with pytest.raises(BadArguments, match=r"zone: Expected `str`, got `int`"):
        client.call("read", 5, zone=5)


def test_raw_body_that_is_no_arguments_is_refused(node) -> None:
    node().serve("clock", {"read": lambda: 1})
    client = node().client("clock")
    for body in (b"\x05", b"\xc1", b"", b"\x92\x01\x02"):
        with pytest.raises(RemoteError):
            client.call_raw("read", body)
    assert client.call("read") == 1


def test_argument_without_a_form_is_refused_before_anything_is_sent(node) -> None:
    serving = node()
    serving.serve("clock", {"read": lambda *_: 1})
    client = node().client("clock")
    for verb in (client.call, client.cast, client.start, client.stream, client.fanout, client.gather):
        with pytest.raises(EncodeError, match=r"a value of type builtins\.object has no form on the wire"):
            verb("read", object())
    assert serving.statistics().taken == 0


def test_reply_without_a_form_is_the_handlers_error(node) -> None:
    node().serve("clock", {"read": object})
    error = remote_error(node().client("clock"), "read")
    assert error.type == "EncodeError"
    assert error.executed == "yes"
    assert "builtins.object" in error.detail


def test_reply_that_does_not_fit_returns_is_told(node) -> None:
    node().serve("clock", {"read": lambda: "five"})
    with pytest.raises(PayloadError, match="Expected `int`, got `str`"):
        node().client("clock", returns=int).call("read")


# Size ---------------------------------------------------------------------------------------------

OVERHEAD = 64  # at least what MessagePack adds around one body


@pytest.mark.parametrize("size", [0, 1, 64 * 1024 - OVERHEAD, 64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1, 1_000_000])
def test_bodies_of_any_size_arrive_whole(node, size) -> None:
    node().serve("clock", {"echo": lambda value: value})
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert node().call("clock", "echo", body) == body


def test_raw_bodies_at_the_border_of_one_and_two_frames_arrive_whole(node, background) -> None:
    listener = node().listen("clock")

    def serve(times: int) -> None:
        for _ in range(times):
            (incoming,) = listener.poll(timeout=10)
            incoming.reply_raw(bytes(incoming.body)[::-1])

    sizes = (64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1, 8 * 1024 * 1024)
    serving = background(serve, len(sizes))
    client = node().client("clock")
    for size in sizes:
        body = b"a" + b"x" * (size - 1)
        assert bytes(client.call_raw("read", body)) == body[::-1]
    serving.result()


def test_request_above_max_message_is_refused_where_it_is_made(node) -> None:
    serving = node()
    serving.serve("clock", {"echo": len})
    client = node().client("clock")
    for verb in (client.call, client.cast, client.stream, client.start, client.fanout, client.gather):
        with pytest.raises(TooLarge, match=r"max_message allows 8388608\. Send less at a time \(stream\), or raise"):
            verb("echo", b"x" * (8 * 1024 * 1024))
    assert client.call("echo", b"x" * (8 * 1024 * 1024 - OVERHEAD)) == 8 * 1024 * 1024 - OVERHEAD


def test_reply_above_max_message_is_the_handlers_error(node) -> None:
    node(max_message=100_000).serve("clock", {"read": lambda size: b"x" * size})
    client = node().client("clock")
    error = remote_error(client, "read", 100_000)
    assert error.type == "TooLarge"
    assert "max_message allows 100000" in error.detail
    assert len(client.call("read", 99_000)) == 99_000


def test_large_requests_wait_for_room_in_the_window_and_are_refused_when_there_is_none_in_time(
    node, gate, background
) -> None:
    node().serve("clock", gate)
    client = node(window_bytes=300_000).client("clock")
    client.call("read")
    held = [client.start("hold", b"x" * 100_000) for _ in range(2)]
    with pytest.raises(Rejected, match="as many as the window allows"):
        client.options(timeout=0.3).call("hold", b"x" * 150_000)
    waiting = background(client.call, "hold", b"x" * 150_000)
    held.append(client.start("hold", b"x" * 60_000))
    began = time.monotonic()
    with pytest.raises(Rejected, match="as many as the window allows"):  # a small one does not wait
        client.call("hold", b"x" * 60_000)
    assert time.monotonic() - began < 10.0
    gate.open.set()
    assert [len(call.result()) for call in held] == [100_000, 100_000, 60_000]
    assert len(waiting.result()) == 150_000


def test_a_request_that_fails_leaves_nothing_for_the_collector_of_garbage(
    make_node, gate, background, eventually
) -> None:
    serving, calling = make_node(inbox_messages=1), make_node()
    serving.serve("clock", gate)
    client = calling.client("clock", ready_timeout=0.0)
    held = background(client.call, "hold")
    gate.wait_entered()
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            with pytest.raises(Rejected):
                client.call("hold", b"x" * 1_000)
            with pytest.raises(NoRoute):
                calling.client("nobody", ready_timeout=0.0).call("hold")
        # The thread of a loop may hold the last one for a moment.
        eventually(lambda: not [error for error in gc.get_objects() if isinstance(error, CallError)])
    finally:
        gc.enable()
    gate.open.set()
    held.result()


# executed -----------------------------------------------------------------------------------------


def test_every_error_of_the_tree_says_whether_the_handler_ran() -> None:
    import onehop.errors as errors

    def below(cls: type) -> list[type]:
        return [cls, *(each for sub in cls.__subclasses__() for each in below(sub))]

    told = {cls.__name__: cls.executed for cls in below(CallError) if cls.__module__ == errors.__name__}  # type: ignore[attr-defined]
    assert told == {
        "CallError": "unknown",
        "NoRoute": "no",
        "Rejected": "no",
        "CallTimeout": "unknown",
        "PeerLost": "unknown",
        "CallCancelled": "unknown",
        "RemoteError": "yes",
        "NoSuchMethod": "no",
        "BadArguments": "no",
    }


def test_unknown_setting_and_bad_server_are_refused_before_anything_runs(node) -> None:
    with pytest.raises(SettingsError, match="is a class; serve an instance of it: Refused"):
        node().serve("clock", Refused)
    with pytest.raises(SettingsError, match="has no public method to serve"):
        node().serve("clock", {})
    with pytest.raises(SettingsError, match="workers is 0; it must be 1 or more"):
        node().serve("clock", {"read": time.time}, workers=0)
    with pytest.raises(SettingsError, match="'read' is to be served but 5 cannot be called"):
        node().serve("clock", {"read": 5})


@pytest.mark.parametrize(("method", "kind"), [("nope", "NoSuchMethod"), ("read", "BadArguments")])
def test_missing_method_of_a_nested_call_is_the_handlers_own_error(node, method, kind) -> None:
    node().serve("inner", {"read": lambda needed: needed})
    middle = node()
    middle.serve("middle", {"relay": lambda: middle.call("inner", method)})
    error = remote_error(node().client("middle"), "relay")
    assert type(error) is RemoteError
    assert (error.type, error.executed) == (kind, "yes")

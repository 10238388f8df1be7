"""``onehop call`` and ``onehop cast``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from onehop import Node
from onehop.cli.calls import parsed
from onehop.cli.console import plain


def test_reply_is_printed_as_json(run: Callable[..., Any], clock: Any) -> None:
    ended = run("call", "clock", "read", "zone=cet")
    assert (ended.code, ended.json, ended.err) == (0, {"zone": "cet", "server": "tower"}, "")


def test_text_is_printed_as_it_is(run: Callable[..., Any], clock: Any) -> None:
    assert run("call", "clock", "text").out == "noon\n"


def test_json_holds_the_reply_and_the_time(run: Callable[..., Any], clock: Any) -> None:
    found = run("call", "clock", "text", "--json").json
    assert found.keys() == {"reply", "seconds"}
    assert found["reply"] == "noon"
    assert 0 < found["seconds"] < 5


def test_everything_has_a_json_form(run: Callable[..., Any], clock: Any) -> None:
    assert run("call", "clock", "odd").json == {"1": "AP8=", "not a number": "nan", "big": 2**70}


def test_items_are_printed_one_a_line(run: Callable[..., Any], clock: Any) -> None:
    assert run("call", "clock", "count", "3", "--stream").out.split() == ["0", "1", "2"]


def test_named_server_is_asked(run: Callable[..., Any], clock: Any, make_node: Callable[..., Node]) -> None:
    make_node().serve("clock", clock, server="church")
    for server in ("church", "tower"):
        assert {run("call", "clock", "read", "--server", server).json["server"] for _ in range(3)} == {server}


def test_global_options_stand_on_either_side(run: Callable[..., Any], clock: Any) -> None:
    assert run("--timeout", "0.1", "call", "clock", "slow", "5").code == 4
    assert run("call", "clock", "slow", "5", "--timeout=0.1").code == 4
    assert run("--realm", "elsewhere", "ls", "--json").json == []
    assert run("ls", "--json", "--realm", "elsewhere").json == []


def test_after_two_dashes_all_are_arguments(run: Callable[..., Any], clock: Any) -> None:
    assert run("call", "clock", "read", "--", "--timeout").json["zone"] == "--timeout"


def test_error_as_json_says_whether_it_ran(run: Callable[..., Any], clock: Any) -> None:
    ended = run("call", "clock", "bad", "--json")
    error = ended.json["error"]
    assert ended.code == 1
    assert (error["type"], error["executed"], error["remote_type"]) == ("RemoteError", "yes", "ValueError")
    assert "the clock stands" in ended.sentence
    assert "Traceback" in error["trace"]


def test_cast_is_run(run: Callable[..., Any], clock: Any, eventually: Callable[..., None]) -> None:
    ended = run("cast", "clock", "set", "[1, 2]")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert run("cast", "clock", "set", "6", "--json").json == {"outcome": "taken"}
    eventually(lambda: sorted(clock.values, key=str) == [6, [1, 2]])


def test_fanout_has_a_receipt_for_each_server(
    run: Callable[..., Any], clock: Any, make_node: Callable[..., Node], eventually: Callable[..., None]
) -> None:
    make_node().serve("clock", clock, server="church")
    ended = run("cast", "clock", "set", "7", "--fanout", "--json")
    assert ended.code == 0
    assert sorted((each["server"], each["outcome"]) for each in ended.json) == [("church", "taken"), ("tower", "taken")]
    assert ended.json[0].keys() == {"server", "node", "host", "outcome", "reason", "seconds"}
    eventually(lambda: clock.values == [7, 7])
    assert "church" in run("cast", "clock", "set", "7", "--fanout").out


def test_fanout_to_nobody_has_its_exit_code(run: Callable[..., Any]) -> None:
    ended = run("cast", "nobody", "set", "7", "--fanout")
    assert ended.code == 3
    assert "onehop ls" in ended.sentence


@pytest.mark.parametrize(
    ("arguments", "positional", "named"),
    [
        (["1", "1.5", "true", "null"], [1, 1.5, True, None], {}),
        (["word", '"1"', ""], ["word", "1", ""], {}),
        (["a=1", "b=word", 'c={"d": [1]}', "e="], [], {"a": 1, "b": "word", "c": {"d": [1]}, "e": ""}),
        (['"a=1"', "1=2", "a.b=3"], ["a=1", "1=2", "a.b=3"], {}),
        (["a=b=c"], [], {"a": "b=c"}),
    ],
)
def test_arguments_are_json_or_words(arguments: list[str], positional: list[Any], named: dict[str, Any]) -> None:
    assert parsed(arguments) == (positional, named)


@pytest.mark.parametrize("argument", ["{a: 1}", "[1,", '"open', "a={"])
def test_what_begins_like_json_must_be_json(run: Callable[..., Any], argument: str) -> None:
    ended = run("call", "clock", "read", argument)
    assert ended.code == 2
    assert "is not JSON" in ended.err


def test_argument_given_twice_is_refused(run: Callable[..., Any]) -> None:
    ended = run("call", "clock", "read", "zone=1", "zone=2")
    assert ended.code == 2
    assert "given twice" in ended.err


def test_plain_values_stay() -> None:
    value = {"a": [1, 2.5, None, True, "x"]}
    assert json.loads(json.dumps(plain(value))) == value

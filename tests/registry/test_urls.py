"""URLs of registries, from both ends."""

from __future__ import annotations

import pytest

from onehop.errors import SettingsError
from onehop.registry.urls import Place, parse
from onehop.settings import redacted


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("etcd://ctl1", Place((("ctl1", 2379),))),
        ("etcd://ctl1:1,ctl2/", Place((("ctl1", 1), ("ctl2", 2379)))),
        ("etcd://[2001:db8::1]:7,[::1]/", Place((("2001:db8::1", 7), ("::1", 2379)))),
        ("etcd://us%40er:p%2Fw%3A@ctl1/", Place((("ctl1", 2379),), "us@er", "p/w:")),
        ("etcd://ctl1/?tls=1&ca=%2Fetc%2Fca", Place((("ctl1", 2379),), options={"tls": "1", "ca": "/etc/ca"})),
    ],
)
def test_what_a_url_says_is_understood(url: str, place: Place) -> None:
    found = parse(url, 2379, ("tls", "ca"))
    assert (found.servers, found.user, found.password, found.options) == (
        place.servers, place.user, place.password, place.options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("etcd:", "it names no server"),
        ("etcd://", "it names no server"),
        ("etcd:///?tls=1", "it names no server"),
        ("etcd://ctl1:0", "'0' in 'ctl1:0' is no port"),
        ("etcd://ctl1:99999", "is no port"),
        ("etcd://ctl1:http", "is no port"),
        ("etcd://2001:db8::1", "an IPv6 address stands in brackets"),
        ("etcd://[::1", "an IPv6 address stands in brackets"),
        ("etcd://ctl1/prefix", "the path '/prefix' has no meaning in it"),
        ("etcd://ctl1/?tsl=1", "it has no option 'tsl'; there are: tls, ca"),
        ("etcd://ctl1/?tls=1&tls=2", "the option 'tls' stands twice"),
        ("etcd://ctl1/#x", "a '#' has no meaning"),
        ("etcd://user:secret@ctl1,user:secret@ctl2/", "stand once, before all servers"),
        ("etcd://user:sec/ret@ctl1/", "'/' is written %2F"),
    ],
)
def test_a_wrong_url_is_refused_with_what_is_wrong_what_would_be_right_and_no_password(url: str, problem: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        parse(url, 2379, ("tls", "ca"))
    assert problem in str(refusal.value)
    assert "it must look like etcd://host1:2379,host2:2379/?tls=..." in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_a_login_where_nobody_asks_for_one_is_refused_and_not_taken_for_a_protection() -> None:
    with pytest.raises(SettingsError, match="nobody asks for them there"):
        parse("hosts://user:secret@ctl1/", 9501, login=False)
    assert parse("hosts://ctl1/", 9501, login=False).servers == (("ctl1", 9501),)


def test_what_is_shown_of_a_url_has_no_password() -> None:
    assert parse("redis://user:secret@ctl1/", 6379).shown == "redis://user:***@ctl1/"
    assert redacted("redis://:secret@ctl1/?db=1") == "redis://:***@ctl1/?db=1"
    assert redacted("local") == "local"

"""Settings: defaults, environment, and the sentence for each that cannot be."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

import onehop
from onehop.errors import SettingsError
from onehop.settings import ENVIRONMENT_PREFIX, LARGEST_MESSAGE, Settings, from_environment, revise

NUMBERS = [each.name for each in fields(Settings) if type(each.default) in (int, float)]


def test_defaults_are_valid_and_each_has_a_line_of_help() -> None:
    settings = Settings()
    assert (settings.timeout, settings.ready_timeout, settings.registry) == (60.0, 1.0, "local")
    for each in fields(Settings):
        assert len(each.metadata["help"]) > 10
        assert "\n" not in each.metadata["help"]


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().timeout = 5.0  # type: ignore[misc]


@pytest.mark.parametrize("name", NUMBERS)
def test_number_below_its_limit_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is -1"):
        revise(Settings(), **{name: -1})


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"ready_timeout"}))
def test_zero_is_refused_where_it_makes_no_sense(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is 0; it must be"):
        revise(Settings(), **{name: 0})


@pytest.mark.parametrize("name", ["timeout", "ready_timeout", "drain_timeout"])
def test_not_a_number_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is nan"):
        Settings(**{name: float("nan")})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["timeout", "ready_timeout", "drain_timeout"])
def test_times_may_be_whole_or_without_an_end(name: str) -> None:
    assert getattr(revise(Settings(), **{name: 5}), name) == 5
    assert getattr(revise(Settings(), **{name: float("inf")}), name) == float("inf")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("timeout", "5", "float"),
        ("timeout", None, "float"),
        ("timeout", True, "float"),
        ("workers", 1.5, "int"),
        ("workers", True, "int"),
        ("realm", None, "str"),
        ("registry", 5, "str"),
    ],
)
def test_value_of_another_type_is_refused_however_it_is_given(name: str, value: Any, wanted: str) -> None:
    for make in (lambda: revise(Settings(), **{name: value}), lambda: Settings(**{name: value})):
        with pytest.raises(SettingsError, match=f"{name} is {value!r}; it must be of type {wanted}"):
            make()


def test_message_beyond_what_a_connection_takes_is_refused() -> None:
    assert Settings(max_message=LARGEST_MESSAGE).max_message == 64 * 2**20
    with pytest.raises(SettingsError, match=r"^max_message is 67108865; it must be 67108864 \(64 MiB\) or less"):
        Settings(max_message=LARGEST_MESSAGE + 1)


def test_unknown_setting_is_named_with_those_there_are() -> None:
    with pytest.raises(
        SettingsError, match="no setting is called 'tiemout'; there are: address, advertise, cache_directory"
    ):
        revise(Settings(), tiemout=5.0)


@pytest.mark.parametrize("name", ["realm", "host"])
def test_name_longer_than_the_wire_allows_is_refused(name: str) -> None:
    assert getattr(Settings(**{name: "x" * 255}), name)  # type: ignore[arg-type]
    for long in ("x" * 256, "ü" * 128):
        with pytest.raises(SettingsError, match=f"{name} is longer than 255 bytes"):
            Settings(**{name: long})  # type: ignore[arg-type]


def test_host_name_is_the_systems_unless_it_is_set() -> None:
    assert Settings().host_name
    assert Settings(host="h1").host_name == "h1"


# Environment --------------------------------------------------------------------------------------


def test_each_setting_can_come_from_the_environment() -> None:
    texts = {str: "x", int: "7", float: "7.5", bool: "yes"}
    environment = {ENVIRONMENT_PREFIX + each.name.upper(): texts[type(each.default)] for each in fields(Settings)}
    settings = from_environment(environment)
    for each in fields(Settings):
        assert getattr(settings, each.name) == {str: "x", int: 7, float: 7.5, bool: True}[type(each.default)]


@pytest.mark.parametrize(
    ("variable", "text", "wanted"), [("ONEHOP_TIMEOUT", "soon", "float"), ("ONEHOP_WORKERS", "1.5", "int")]
)
def test_variable_that_cannot_be_read_is_named(variable: str, text: str, wanted: str) -> None:
    with pytest.raises(SettingsError, match=f"{variable} is '{text}'; it must be of type {wanted}"):
        from_environment({variable: text})


def test_what_is_given_wins_over_the_environment() -> None:
    settings = from_environment({"ONEHOP_TIMEOUT": "5", "ONEHOP_WORKERS": "3"}, timeout=7.0)
    assert (settings.timeout, settings.workers) == (7.0, 3)


def test_variables_of_others_are_left_alone() -> None:
    assert from_environment({"ONEHOP": "x", "TIMEOUT": "5", "ONEHOP_SOMETHING_ELSE": "x"}) == Settings()


def test_values_in_the_environment_are_checked_too() -> None:
    with pytest.raises(SettingsError, match=r"timeout is -1\.0; it must be a number of seconds above 0"):
        from_environment({"ONEHOP_TIMEOUT": "-1"})


# Passwords ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:se%2Fcret@h1:6379,h2/?db=1", "redis://me:***@h1:6379,h2/?db=1"),
        ("redis://:secret@h1/", "redis://:***@h1/"),
        ("redis://me:se/cret@h1/?tls=1", "redis://me:***@h1/?tls=1"),
        ("redis://me:se?cret@h1", "redis://me:***@h1"),
        ("redis://me:se@cret@h1/", "redis://me:***@h1/"),
        ("redis://m/e:secret@h1/", "redis://m/e:***@h1/"),
        ("redis:me:secret@h1", "redis:me:***@h1"),
        ("redis://me:secret@h1,me:secret@h2/", "redis://me:***@h2/"),
        ("redis://h1/?password=secret&db=1", "redis://h1/?password=***&db=1"),
    ],
)
def test_password_of_the_registry_is_never_shown(url: str, shown: str) -> None:
    settings = Settings(registry=url)
    assert settings.registry == url
    assert settings.shown_registry == shown
    for text in (repr(settings), str(settings)):
        assert repr(shown) in text
        assert "secret" not in text


@pytest.mark.parametrize(
    "url",
    ["local", "file:///etc/a@b.toml", "redis://me@h1:6379,h2/?ca=/etc/x.pem", "hosts://[2001:db8::1]:9501,b/", ""],
)
def test_registry_without_a_password_is_shown_as_it_is(url: str) -> None:
    assert Settings(registry=url).shown_registry == url


def test_settings_that_let_nobody_listen_are_told_before_anything_is_touched() -> None:
    for wrong, told in (
        ({"ports": "9564-9501"}, "such as 9501-9564"),
        ({"advertise": "myhost"}, "must be an IP address"),
        ({"advertise": "0.0.0.0"}, "nobody can be reached"),
        ({"registry": "nonsense://x"}, "it must be, or be a URL that begins with"),
    ):
        with pytest.raises(SettingsError, match=told):
            onehop.Node(**wrong).check()
    onehop.Node().check()

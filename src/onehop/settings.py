"""All settings of a node, in one frozen object."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from onehop.errors import SettingsError

ENVIRONMENT_PREFIX = "ONEHOP_"
LARGEST_MESSAGE = 64 * 1024 * 1024
"""Bytes; a connection ends at a frame that is larger."""


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class Settings:
    """What a node is told once, at its construction.

    Times are in seconds, sizes in bytes. Any field can also be given in the environment as
    ``ONEHOP_<FIELD>`` (upper case): see :func:`from_environment`.
    """

    registry: str = _setting("local", "where records live: 'local', or a URL whose scheme names a registry")
    realm: str = _setting("", "keeps two sites on one registry apart; nodes see only their own realm")
    host: str = _setting("", "this host's name in records; empty means the system's host name")
    run_directory: str = _setting(
        "", "sockets and local records; empty means $XDG_RUNTIME_DIR/onehop, else /run/onehop"
    )
    group: str = _setting("", "group that shares the run directory (mode 0770 instead of 0700)")
    zone: str = _setting("", "a label for locality, carried in the record")
    address: str = _setting(
        "",
        "IP address to listen at beyond this host, or a network (10.0.0.0/16) in which this host has one; empty "
        "means the address from which the registry is reached",
    )
    advertise: str = _setting("", "IP address at which others reach this host, where it is another (translated)")
    ports: str = _setting("9501-9564", "TCP ports to listen at, outside the kernel's ephemeral range")
    insecure: bool = _setting(False, "listen beyond this host without keys: whoever reaches the port may call")
    lease: float = _setting(6.0, "how long a registry keeps the record of a node that is silent, in seconds")
    cache_directory: str = _setting(
        "",
        "where the last view of a registry is kept for a start without it; empty means /var/cache/onehop, "
        "$XDG_CACHE_HOME/onehop or ~/.cache/onehop; 'none' means nowhere",
    )
    timeout: float = _setting(60.0, "deadline of a call that names none, in seconds")
    ready_timeout: float = _setting(1.0, "how long a call waits for somebody to offer the service, in seconds")
    drain_timeout: float = _setting(9.0, "how long a drain waits for taken requests to be answered, in seconds")
    workers: int = _setting(8, "threads that run the handlers of one service")
    inbox_messages: int = _setting(10_000, "requests taken in and not answered, at most")
    inbox_bytes: int = _setting(256 * 1024 * 1024, "bytes of requests taken in and not answered, at most")
    window_messages: int = _setting(4_096, "requests under way to one peer, at most")
    window_bytes: int = _setting(
        8 * 1024 * 1024, "bytes of requests under way to one peer, at most; a larger one goes alone"
    )
    subset: int = _setting(12, "nodes of a service among which a client's calls go round, at least")
    idle_timeout: float = _setting(600.0, "how long an unused connection is kept, in seconds, give or take a fifth")
    relay: bool = _setting(True, "pass fan-outs to very many receivers on for others")
    fanout_direct: int = _setting(2_000, "receivers to which a fan-out goes without relays, at most")
    max_message: int = _setting(8 * 1024 * 1024, "bytes of one message, at most")
    stream_credit: int = _setting(32, "items a stream's writer may be ahead of its reader")
    duplicate_window: int = _setting(4_096, "how far out of order a request may come and still be known as new")

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_type(each.name, type(each.default), getattr(self, each.name))
        for name in ("realm", "host"):
            if len(getattr(self, name).encode("utf-8", "replace")) > 255:
                raise SettingsError(f"{name} is longer than 255 bytes: {getattr(self, name)[:40]!r}...")
        for name in ("timeout", "drain_timeout", "lease", "idle_timeout"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; it must be a number of seconds above 0")
        if not self.ready_timeout >= 0:
            raise SettingsError(f"ready_timeout is {self.ready_timeout!r}; it must be 0 or more seconds")
        for each in fields(self):
            if type(each.default) is int and getattr(self, each.name) < 1:
                raise SettingsError(f"{each.name} is {getattr(self, each.name)!r}; it must be 1 or more")
        if self.max_message > LARGEST_MESSAGE:
            raise SettingsError(
                f"max_message is {self.max_message}; it must be {LARGEST_MESSAGE} (64 MiB) or less; stream more"
            )

    @property
    def host_name(self) -> str:
        """The host's name as it stands in this node's record."""
        return self.host or socket.gethostname()

    @property
    def shown_registry(self) -> str:
        """The registry for people and logs: without the password."""
        return redacted(self.registry)

    def __repr__(self) -> str:
        values = {each.name: getattr(self, each.name) for each in fields(self)} | {"registry": self.shown_registry}
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def redacted(url: str) -> str:
    """``url`` without the passwords that may stand in it, be it where none belongs; rather too short than too long."""
    # Up to the last @, since a password may hold what should have been percent-encoded.
    url = re.sub(r"^([^:/?#]+:(?://)?[^:]*:).*@", r"\1***@", url, flags=re.DOTALL)
    return re.sub(r"([?&][^=&]*(?:pass|secret|token)[^=&]*=)[^&]*", r"\1***", url, flags=re.IGNORECASE)


def from_environment(environment: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Settings from ``ONEHOP_*`` variables, with ``overrides`` on top.

    Args:
        environment: the variables to read; the process's own by default.
        overrides: fields by name; these win.

    Raises:
        SettingsError: a variable or an override is unknown, or its value does not fit.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for each in fields(Settings):
        text = environment.get(ENVIRONMENT_PREFIX + each.name.upper())
        if text is not None:
            values[each.name] = _parse(each.name, type(each.default), text)
    return revise(Settings(**values), **overrides)


def revise(settings: Settings, **changes: Any) -> Settings:
    """A copy of ``settings`` with some fields changed.

    Raises:
        SettingsError: a field is unknown, of the wrong type, or its value does not fit.
    """
    known = sorted(each.name for each in fields(Settings))
    for name in changes:
        if name not in known:
            raise SettingsError(f"no setting is called {name!r}; there are: {', '.join(known)}")
    return replace(settings, **changes)


def _check_type(name: str, wanted: type, value: Any) -> None:
    fits = isinstance(value, (int, float) if wanted is float else wanted)
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise SettingsError(f"setting {name} is {value!r}; it must be of type {wanted.__name__}")


def _parse(name: str, wanted: type, text: str) -> Any:
    try:
        if wanted is bool:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        return wanted(text)
    except (KeyError, ValueError):
        variable = ENVIRONMENT_PREFIX + name.upper()
        raise SettingsError(f"{variable} is {text!r}; it must be of type {wanted.__name__}") from None

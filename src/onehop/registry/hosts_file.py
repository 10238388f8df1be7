"""The list of hosts in a file, for sites that template everything."""

from __future__ import annotations

import logging
import math
import re
import tomllib
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from onehop.errors import SettingsError
from onehop.settings import redacted

_log = logging.getLogger(__name__)

Server = tuple[str, int]


class HostsList:
    """Hosts and ports that stay as they are.

    Attributes:
        period: seconds between two looks whether they changed.
    """

    period = math.inf

    def __init__(self, servers: tuple[Server, ...]) -> None:
        self._servers = servers

    @property
    def servers(self) -> tuple[Server, ...]:
        return self._servers

    def look(self) -> None:
        """Learn what changed."""


class HostsFile(HostsList):
    """A list in TOML: a table ``[[hosts]]`` for each, with ``name``, and ``address`` and ``port`` where needed.

    Args:
        url: ``file:///etc/onehop/peers.toml``.
        port: of hosts that name none.

    Raises:
        SettingsError: the URL names no file. What is wrong in the file itself is said at its first reading.
    """

    period = 1.0

    def __init__(self, url: str, port: int) -> None:
        super().__init__(())
        path = url[len("file:") :]
        if not path.startswith("///") or "?" in path or "#" in path:
            raise SettingsError(f"registry is {redacted(url)!r}; it must look like file:///etc/onehop/peers.toml")
        self._path = Path(unquote(path[2:]))
        self._port = port
        self._signature: tuple[int, int, int] | None = None
        self._problem = ""

    @property
    def servers(self) -> tuple[Server, ...]:
        """The last good list. Raises SettingsError if there never was one."""
        if not self._servers:
            self._servers = self._read()
        return self._servers

    def look(self) -> None:
        """Read the file again if it changed; where it is wrong, the last good list stays, with one warning."""
        try:
            found = self._path.stat()
            signature = found.st_ino, found.st_mtime_ns, found.st_size
            if signature == self._signature:
                return
            self._signature = signature
            self._servers = self._read()
            self._problem = ""
        except (OSError, SettingsError) as error:
            problem = str(error)
            if problem != self._problem:
                _log.warning("the hosts listed before stay: %s", problem)
            self._problem = problem

    def _read(self) -> tuple[Server, ...]:
        try:
            text = self._path.read_text(encoding="utf-8")
            content = tomllib.loads(text)
        except OSError as error:
            raise SettingsError(f"the list of hosts {self._path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # not TOML, or not UTF-8
            raise SettingsError(f"{self._path} is not a list of hosts in TOML: {error}; {_EXAMPLE}") from error
        hosts = content.get("hosts")
        if content.keys() != {"hosts"} or not isinstance(hosts, list) or not hosts:
            raise SettingsError(f"{self._path} must hold tables [[hosts]], at least one, and nothing else; {_EXAMPLE}")
        servers = [self._server(each, number, text) for number, each in enumerate(hosts)]
        return tuple(dict.fromkeys(servers))

    def _server(self, host: Any, number: int, text: str) -> Server:
        def wrong(key: str, problem: str) -> SettingsError:
            return SettingsError(f"{self._path}, line {_line_number(text, number, key)}: {problem}; {_EXAMPLE}")

        if not isinstance(host, dict):
            raise wrong("", f"{host!r} is no table")
        for key in host.keys() - {"name", "address", "port"}:
            raise wrong(key, f"a host has no {key!r}")
        name, address, port = host.get("name"), host.get("address", ""), host.get("port", self._port)
        if not isinstance(name, str) or not name or any(each.isspace() or each in ":/" for each in name):
            raise wrong("name", f"the name is {name!r}; it must be that of a host")
        if not isinstance(address, str) or (address and not _is_address(address)):
            raise wrong("address", f"the address is {address!r}; it must be an IP address")
        if type(port) is not int or not 0 < port < 65_536:
            raise wrong("port", f"the port is {port!r}; it must be a number from 1 to 65535")
        return address or name, port


_EXAMPLE = 'a host looks like this: [[hosts]] name = "ctl1" address = "10.0.0.1" port = 9501, the last two where needed'


def _is_address(text: str) -> bool:
    with suppress(ValueError):
        ip_address(text)
        return True
    return False


def _line_number(text: str, number: int, key: str) -> int:
    """Where ``key`` stands in the table of that number, or where that begins."""
    lines = text.splitlines()
    starts = [at for at, line in enumerate(lines) if re.match(r"\s*\[\[\s*hosts\s*\]\]", line)]
    if number >= len(starts):  # written in another form
        return next((at for at, line in enumerate(lines, 1) if "hosts" in line), 1)
    end = starts[number + 1] if number + 1 < len(starts) else len(lines)
    inside = range(starts[number], end)
    return next((at for at in inside if key and re.match(rf"\s*{re.escape(key)}\s*=", lines[at])), starts[number]) + 1

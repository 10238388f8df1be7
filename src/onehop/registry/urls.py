"""URLs of registries: ``scheme://[user[:password]@]host[:port][,host[:port]...]/[?option=value&...]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

from onehop.errors import SettingsError
from onehop.settings import redacted


@dataclass(frozen=True, slots=True)
class Place:
    """Where a registry is, as its URL says.

    Attributes:
        servers: host (a name, or an IP address without brackets) and port of each, in the order given; at least one.
        user, password: empty where none is given.
        options: of the query, by name; each at most once.
        shown: the URL for people and logs: without the password.
    """

    servers: tuple[tuple[str, int], ...]
    user: str = ""
    password: str = field(default="", repr=False)
    options: Mapping[str, str] = field(default_factory=dict)
    shown: str = ""


def parse(url: str, port: int, options: tuple[str, ...] = (), *, login: bool = True) -> Place:
    """What ``url`` says.

    Args:
        port: of servers that name none.
        options: names that the query may have.
        login: whether there may be a user and a password.

    Raises:
        SettingsError: it is not such a URL; says what is wrong and what would be right.
    """
    scheme, _, rest = url.partition(":")
    shown = redacted(url)

    def wrong(problem: str) -> SettingsError:
        example = f"{scheme}://host1:{port},host2:{port}/" + (f"?{options[0]}=..." if options else "")
        return SettingsError(f"registry is {shown!r}: {problem}; it must look like {example}")

    if not rest.startswith("//"):
        raise wrong("it names no server")
    place, _, query = rest[2:].partition("?")
    place, slash, path = place.partition("/")
    if "@" in rest and "@" not in place:
        raise wrong("in a user and a password '/' is written %2F, and '?' is %3F; behind the hosts '@' is %40")
    if "#" in url:
        raise wrong("a '#' has no meaning in it")
    if path:
        raise wrong(f"the path {slash + path!r} has no meaning in it (the realm is a setting of its own)")
    words, at, hosts = place.rpartition("@")
    if at and not login:
        raise wrong("a user and a password have no meaning in it: nobody asks for them there")
    if "@" in words:
        raise wrong("a user and a password stand once, before all servers; an '@' in them is written %40")
    user, _, password = words.partition(":") if at else ("", "", "")
    servers = tuple(_server(each, port, wrong) for each in hosts.split(",") if each)
    if not servers:
        raise wrong("it names no server")
    given: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in options:
            raise wrong(f"it has no option {name!r}; there are: {', '.join(options) or 'none'}")
        if name in given:
            raise wrong(f"the option {name!r} stands twice in it")
        given[name] = value
    return Place(servers, unquote(user), unquote(password), given, shown)


def _server(text: str, port: int, wrong: Callable[[str], SettingsError]) -> tuple[str, int]:
    host, colon, digits = text, "", ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        colon, digits = rest[:1], rest[1:]
        if not bracket or (rest and colon != ":"):
            raise wrong(f"{text!r} is no server: an IPv6 address stands in brackets, as in [2001:db8::1]:{port}")
    elif text.count(":") == 1:
        host, colon, digits = text.partition(":")
    elif ":" in text:
        raise wrong(f"{text!r} is no server: an IPv6 address stands in brackets, as in [2001:db8::1]:{port}")
    if colon and not (digits.isascii() and digits.isdigit() and 0 < int(digits) < 65_536):
        raise wrong(f"{digits!r} in {text!r} is no port (1 to 65535)")
    host = unquote(host)
    if not host or any(each.isspace() or each in "/?#@" for each in host):
        raise wrong(f"{text!r} names no host")
    return host, int(digits) if colon else port

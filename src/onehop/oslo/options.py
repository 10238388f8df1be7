"""The options of ``[oslo_messaging_zmq]``, and what a transport URL says: registry, realm and options."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import quote, urlencode

from oslo_config import cfg
from oslo_messaging import TransportURL
from oslo_messaging import transport as oslo_transport
from oslo_messaging._drivers import common

from onehop import Node, errors
from onehop.settings import redacted

LOG = logging.getLogger(__name__)

GROUP = "oslo_messaging_zmq"

# These become settings of the node; what is not given here comes from ONEHOP_* in the environment, then the default.
NODE_OPTIONS = [
    cfg.StrOpt(
        "registry",
        secret=True,  # its password
        help="Where processes find each other, for transport URLs that do not say it (zmq://): 'local' (this host, the "
        "default), or a registry URL.",
    ),
    cfg.StrOpt("realm", help="The realm, where the transport URL has no virtual host to say it."),
    cfg.StrOpt("host", help="The name of this host in records; by default the system's host name."),
    cfg.StrOpt("run_directory", help="Sockets and records of this host; by default $XDG_RUNTIME_DIR/onehop."),
    cfg.StrOpt("group", help="Group that shares the run directory (mode 0770), where services run as several users."),
    cfg.StrOpt("zone", help="A label for locality, carried in the record of this process."),
    cfg.StrOpt(
        "address",
        help="IP address to listen at for other hosts, or the network (10.0.0.0/16) in which this host has one; by "
        "default the address from which the registry is reached.",
    ),
    cfg.StrOpt("advertise", help="IP address at which other hosts reach this one, where it is another (translated)."),
    cfg.StrOpt("ports", help="TCP ports to listen at for other hosts, one for each process (9501-9564 by default)."),
    cfg.BoolOpt("insecure", help="Listen for other hosts without keys: whoever reaches the port may call."),
    cfg.FloatOpt("lease", help="Seconds for which a registry keeps the record of a silent process (6 by default)."),
    cfg.StrOpt(
        "cache_directory",
        help="Where the last view of a registry is kept for a start without it; 'none': nowhere. By default "
        "/var/cache/onehop, $XDG_CACHE_HOME/onehop or ~/.cache/onehop.",
    ),
    cfg.IntOpt("subset", min=1, help="Processes of a topic among which calls go round, at least (12 by default)."),
    cfg.FloatOpt("idle_timeout", help="Seconds for which an unused connection is kept (600 by default)."),
    cfg.BoolOpt("relay", help="Whether this process passes fan-outs to very many receivers on for others (true)."),
    cfg.IntOpt("fanout_direct", min=1, help="Receivers to which a fan-out goes without relays, at most (2000)."),
    cfg.IntOpt("max_message", min=1024, help="Bytes of one message, at most (8 MiB by default)."),
    cfg.IntOpt("inbox_messages", min=1, help="Requests taken in and not dealt with, at most (10000 by default)."),
]
OPTIONS = [
    *NODE_OPTIONS,
    cfg.FloatOpt("cast_timeout", default=10.0, min=0.1, help="Seconds a present receiver may take to take a cast in."),
    cfg.FloatOpt("cast_ttl", default=60.0, min=0.0, help="Seconds a sender holds a cast whose receiver is away."),
    cfg.FloatOpt("notification_ttl", default=300.0, min=0.0, help="Seconds it is held while nobody listens."),
    cfg.IntOpt("outbox_messages", default=10_000, min=0, help="Casts and notifications held by a process, at most."),
    cfg.IntOpt("outbox_bytes", default=67_108_864, min=0, help="Bytes of casts and notifications held, at most."),
]
NAMES = [each.dest for each in OPTIONS]


def list_opts() -> list[tuple[str, list[Any]]]:
    """The options by group, for oslo.config's sample generator."""
    return [(GROUP, list(OPTIONS))]


def read(conf: Any, url: TransportURL) -> dict[str, Any]:
    """The values of all options, as a transport URL and ``conf`` give them.

    ``zmq://`` leaves the registry to the options; ``zmq+`` and the URL of a registry names it. The virtual host is the
    realm, except that of ``zmq+file``, which is the file's path. What the query holds besides options of ours is the
    registry's. What oslo.messaging itself reads is registered on ``conf`` too.

    Args:
        conf: the program's ConfigOpts, private or global.
        url: the transport URL.

    Returns:
        The values by name, of those given in the URL's query rather than in ``conf``; None where nothing is said.

    Raises:
        oslo_messaging.InvalidTransportURL: the URL, or an option, cannot be; says what would be right.
    """
    conf.register_opts(OPTIONS, group=cfg.OptGroup(GROUP, title="onehop: brokerless RPC on ZeroMQ"))
    _register_of_the_library(conf)
    ours = {name: value for name, value in url.query.items() if name in NAMES}
    rest = {name: value for name, value in url.query.items() if name not in NAMES}
    try:
        view = common.ConfigOptsProxy(conf, TransportURL(conf, query=ours), GROUP)[GROUP]
    except ValueError as error:
        raise _wrong(url, f"a value in the query does not fit its option: {error}") from error
    values = {name: view[name] for name in NAMES}
    if realm := _realm(url):
        values["realm"] = realm
    if registry := _registry(url, rest):
        if values["registry"]:
            LOG.info("registry = %s of [%s] does not count for %s", redacted(values["registry"]), GROUP, shown(url))
        values["registry"] = registry
    try:
        node_of(values).check()
    except errors.SettingsError as error:
        # The registry says which options it has, and does not know of those that were taken out before it saw them.
        unknown = any(f"no option {name!r}" in str(error) for name in rest)
        more = f"; the query may hold options of [{GROUP}] too: {', '.join(NAMES)}" if unknown else ""
        raise _wrong(url, f"{error}{more}") from error
    return values


def node_of(values: dict[str, Any]) -> Node:
    """A node with these values of the options.

    Raises:
        SettingsError: one of them does not fit.
    """
    return Node(**{each.dest: values[each.dest] for each in NODE_OPTIONS if values[each.dest] is not None})


def _realm(url: TransportURL) -> str:
    """The realm that stands in the URL's path; empty where none does."""
    realm = "" if url.transport == "zmq+file" else url.virtual_host or ""
    if any(each in realm for each in "/?&=#"):
        raise _wrong(url, f"the realm is {realm!r}: it has no '/', and options stand behind a '?', as in "
                          f"{url.transport}://{'host' if url.hosts else ''}/realm?lease=6")  # fmt: skip
    if realm and url.query.get("realm", realm) != realm:
        raise _wrong(url, f"it names two realms, {realm!r} and {url.query['realm']!r}: leave one out")
    return realm


def _registry(url: TransportURL, query: dict[str, str]) -> str:
    """The URL of the registry that the transport URL names; empty where the options name it."""
    _, plus, scheme = url.transport.partition("+")
    path = quote(url.virtual_host or "") if scheme == "file" else ""
    if not plus and url.hosts:
        raise _wrong(url, "zmq:// joins the processes of one host and takes no host names: write zmq:// or "
                          "zmq:///realm, or zmq+hosts://, zmq+redis:// and the like for several hosts")  # fmt: skip
    if not plus and query:
        raise _wrong(url, f"no option is called {min(query)!r}; there are: {', '.join(NAMES)}")
    if plus and "registry" in url.query:
        raise _wrong(url, f"it names two registries: leave the option registry out, or write zmq:// without +{scheme}")
    if scheme == "file" and not path:
        raise _wrong(url, "it names no file, as in zmq+file:///etc/onehop/peers.toml")
    return f"{scheme}://{_servers(url)}/{path}{'?' if query else ''}{urlencode(query)}" if plus else ""


def _servers(url: TransportURL) -> str:
    """The hosts as registries want them: with one login, before all."""
    logins = {(each.username or "", each.password or "") for each in url.hosts} - {("", "")}
    if len(logins) > 1:
        raise _wrong(url, "its hosts have different users or passwords, and a registry has one: write the same "
                          "before each host")  # fmt: skip
    login = "".join(f"{quote(user, '')}{password and ':'}{quote(password, '')}@" for user, password in logins)
    return login + ",".join(_server(each.hostname or "", each.port) for each in url.hosts)


def _server(host: str, port: int | None) -> str:
    return (f"[{host}]" if ":" in host else host) + ("" if port is None else f":{port}")


def shown(url: TransportURL) -> str:
    """The URL for people and logs: without passwords."""
    query = {name: redacted(value) for name, value in url.query.items()}
    return redacted(str(TransportURL(url.conf, url.transport, url.virtual_host, url.hosts, query)))


def _wrong(url: TransportURL, problem: str) -> oslo_transport.InvalidTransportURL:
    return oslo_transport.InvalidTransportURL(shown(url), f"transport URL {shown(url)!r}: {problem}")


def _register_of_the_library(conf: Any) -> None:
    # oslo.messaging registers these on the global ConfigOpts only, and reads them from the transport's.
    for name in ("metrics", "tracing"):
        group = f"oslo_messaging_{name}"
        try:
            client = __import__(f"oslo_messaging._{name}.client", fromlist=[group])
        except ImportError:  # a release without it does not read it
            continue
        conf.register_opts(getattr(client, group, []), group=group)

"""The options of ``[oslo_messaging_zmq]``. Any of them may also stand in the query of the transport URL."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg
from oslo_messaging import TransportURL
from oslo_messaging import transport as oslo_transport
from oslo_messaging._drivers import common

GROUP = "oslo_messaging_zmq"

# These become settings of the node; what is not given here comes from ONEHOP_* in the environment, then the default.
NODE_OPTIONS = [
    cfg.StrOpt(
        "registry", help="Where processes find each other: 'local' (this host, the default), or a registry URL."
    ),
    cfg.StrOpt("host", help="The name of this host in records; by default the system's host name."),
    cfg.StrOpt("run_directory", help="Sockets and records of this host; by default $XDG_RUNTIME_DIR/onehop."),
    cfg.StrOpt("group", help="Group that shares the run directory (mode 0770), where services run as several users."),
    cfg.StrOpt("zone", help="A label for locality, carried in the record of this process."),
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


def list_opts() -> list[tuple[str, list[Any]]]:
    """The options by group, for oslo.config's sample generator."""
    return [(GROUP, list(OPTIONS))]


def register(conf: Any, url: TransportURL) -> Any:
    """Register what the driver and oslo.messaging read on ``conf``, and put the URL's query on top.

    Args:
        conf: the program's ConfigOpts, private or global.
        url: the transport URL.

    Returns:
        A view of ``conf`` in which values of the URL's query replace those of our group.

    Raises:
        oslo_config.cfg.NoSuchOptError: the query names no option of ours.
        oslo_messaging.InvalidTransportURL: the URL has hosts, an unknown variant, or a query value that does not fit.
    """
    if url.transport != "zmq":
        raise _wrong(f"{url.transport}:// is not known: this release has zmq:// only")
    if url.hosts:
        raise _wrong("zmq:// joins the processes of one host and takes no host names: write zmq:// or zmq:///realm "
                     "(schemes that take hosts, such as zmq+hosts://, come with a later release)")  # fmt: skip
    conf.register_opts(OPTIONS, group=cfg.OptGroup(GROUP, title="onehop: brokerless RPC on ZeroMQ"))
    _register_of_the_library(conf)
    try:
        return common.ConfigOptsProxy(conf, url, GROUP)
    except ValueError as error:
        raise _wrong(f"a value in the query of the zmq:// URL does not fit its option: {error}") from error


def _wrong(problem: str) -> oslo_transport.InvalidTransportURL:
    return oslo_transport.InvalidTransportURL("zmq", problem)


def _register_of_the_library(conf: Any) -> None:
    # oslo.messaging registers these on the global ConfigOpts only, and reads them from the transport's.
    for name in ("metrics", "tracing"):
        group = f"oslo_messaging_{name}"
        try:
            client = __import__(f"oslo_messaging._{name}.client", fromlist=[group])
        except ImportError:  # a release without it does not read it
            continue
        conf.register_opts(getattr(client, group, []), group=group)

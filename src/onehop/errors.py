"""Every error onehop raises, in one tree.

::

    OnehopError
      CallError                what a call, cast, stream or fan-out may raise
        NoRoute                nobody ready offers this                   did not run
        Rejected               the peer refused: full, draining, expired  did not run
        CallTimeout            the deadline passed; also a TimeoutError   unknown, or did not run
        PeerLost               the peer went away                         unknown, or did not run
        CallCancelled          the caller gave the call up                unknown, or did not run
        RemoteError            the handler raised                         ran
          NoSuchMethod         the service has no such method             did not run
          BadArguments         the method takes other arguments           did not run
      ProtocolError
        WireError              a peer sent what the wire format does not allow
        VersionMismatch        a peer speaks only versions we do not
      PayloadError             a value that cannot be sent or understood
        EncodeError            this value has no form on the wire
        DecodeError            these bytes are not a value
        TooLarge               larger than ``max_message``
      RegistryError            where records live could not be reached or used
      SettingsError            a setting, an argument or a URL is wrong
      ResourceLimit            the machine refused: descriptors, sockets
        NoThread               ... or a thread
      NodeClosed               you closed it (compare PeerLost: they did)

Every :class:`CallError` carries ``executed``: ``"no"``, ``"yes"`` or ``"unknown"``, the answer to the
question that decides whether a request may be sent again.
"""

from __future__ import annotations

from typing import Literal

Executed = Literal["no", "yes", "unknown"]


class OnehopError(Exception):
    """The root of all errors raised by onehop."""


class CallError(OnehopError):
    """A request did not end in a reply.

    Args:
        message: one sentence that names what happened, where, and the next step.
        executed: whether the handler ran: ``"no"``, ``"yes"`` or ``"unknown"``.
    """

    executed: Executed = "unknown"

    def __init__(self, message: str, *, executed: Executed | None = None) -> None:
        super().__init__(message)
        if executed is not None:
            self.executed = executed


class NoRoute(CallError):
    """Nobody ready offers the service, or the named server is away. The handler did not run."""

    executed: Executed = "no"


class Rejected(CallError):
    """The peer refused the request before running it.

    ``reason`` is one of the words of :data:`onehop.protocol.wire.REASONS`, such as ``"full"``,
    ``"draining"``, ``"expired"``.
    """

    executed: Executed = "no"

    def __init__(self, message: str, *, reason: str, executed: Executed | None = None) -> None:
        super().__init__(message, executed=executed)
        self.reason = reason


class CallTimeout(CallError, TimeoutError):
    """The deadline passed without a reply (or, with a monitor, without a sign of life)."""


class PeerLost(CallError):
    """The peer's connection ended before its answer came."""


class CallCancelled(CallError):
    """The caller gave the call up; the server was told."""


class RemoteError(CallError):
    """The handler raised an exception.

    Attributes:
        type: the exception's class name, as the server has it.
        module: the module of that class, as the server has it.
        detail: the exception's own message.
        trace: the traceback at the server, as text.
        arguments: what of ``exception.args`` could be sent.
    """

    executed: Executed = "yes"

    def __init__(
        self,
        message: str,
        *,
        type: str = "",
        module: str = "",
        detail: str = "",
        trace: str = "",
        arguments: tuple[object, ...] = (),
        executed: Executed | None = None,
    ) -> None:
        super().__init__(message, executed=executed)
        self.type = type
        self.module = module
        self.detail = detail
        self.trace = trace
        self.arguments = arguments


class NoSuchMethod(RemoteError):
    """The service has no method of that name. No handler ran."""

    executed: Executed = "no"


class BadArguments(RemoteError):
    """The method exists and takes other arguments. The handler did not run."""

    executed: Executed = "no"


class ProtocolError(OnehopError):
    """The conversation between two nodes broke its rules."""


class WireError(ProtocolError):
    """A frame does not follow the wire format (docs/reference/wire.md)."""


class VersionMismatch(ProtocolError):
    """Two nodes have no version of the wire format in common."""


class PayloadError(OnehopError):
    """A value could not be sent or understood."""


class EncodeError(PayloadError):
    """The value has no form on the wire; the message names the type and where it sits."""


class DecodeError(PayloadError):
    """The bytes are not a value of the expected shape."""


class TooLarge(PayloadError):
    """The encoded message is larger than ``max_message``."""


class RegistryError(OnehopError):
    """The place where records live could not be reached, used or understood."""


class SettingsError(OnehopError, ValueError):
    """A setting, an argument or a URL is wrong; the message says what would be right."""


class ResourceLimit(OnehopError):
    """The machine refused a descriptor, a socket or a thread; the message says which limit to raise."""


class NoThread(ResourceLimit, RuntimeError):
    """The machine gave no thread; nothing was begun that needs one. It may be tried again."""

    @classmethod
    def told(cls, name: str, error: RuntimeError) -> NoThread:
        """The error for the thread ``name``."""
        return cls(
            f"the machine gives no thread for {name}: {error}; raise the limit (ulimit -u, or TasksMax= in its systemd "
            "unit), or give it memory"
        )


class NodeClosed(OnehopError):
    """The node was closed here (or belongs to the parent of this forked process)."""

"""Immutable snapshots of what a node counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

RELEASE = "0.1.0"
"""The version of onehop, as records and hellos tell it."""


class PeerStatistics(msgspec.Struct, frozen=True):
    """One peer, as seen from here."""

    node: str
    host: str
    state: str
    """``"stalled"`` where it does not answer what it owes; otherwise as its connection is: ``"ready"``, say."""
    in_flight: int
    """Requests sent to it and not answered."""
    sent: int
    """Requests ever numbered for it, on all its connections."""
    late: int
    """Answers that came after their call had ended; dropped."""
    bad_frames: int
    """Frames of its that break the wire format; dropped."""


def of_peer(peer: Any) -> PeerStatistics:
    """The snapshot of a peer, as :class:`onehop.protocol.peers.Peer` keeps it."""
    host = "" if peer.record is None else peer.record.host
    bad_frames = 0 if peer.link is None else peer.link.bad_frames
    calls = peer.calls
    return PeerStatistics(peer.id.hex(), host, peer.state, len(calls.pending), calls.last, calls.late, bad_frames)


class Statistics(msgspec.Struct, frozen=True):
    """What a node counts, at one moment. Counters begin at the node's first use."""

    node: str
    host: str
    state: str
    """``"serving"``; ``"draining"``: it takes nothing new; ``"not serving"``: it offers nothing, or was drained."""
    peers: tuple[PeerStatistics, ...]
    outcomes: Mapping[str, int]
    """How requests made here ended, where not well: error class name to number.

    Of what was begun (``start``), streamed or sent to many, the deadlines that came alone: what else became of each is
    in its result or its receipt, for whoever asks.
    """
    retried: int
    """Requests sent again because the first server had certainly not run them."""
    taken: int
    """Requests taken in and not yet answered."""
    taken_bytes: int
    waiting: int
    """Of these, how many no worker has begun."""
    refused: Mapping[str, int]
    """Requests refused here: reason to number."""
    received: Mapping[str, int]
    """What else came in: bad frames, duplicates, cancelled calls, version mismatches."""
    dropped: Mapping[str, int]
    """What could not be delivered, such as answers to peers that are gone or do not read; and connections that were
    turned away for want of descriptors, or failed before a first message."""
    registry: str
    """The registry's URL, without its password."""
    records: int
    """Records known at the last look."""

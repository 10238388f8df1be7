"""The retry budget: whatever fails, retries stay a fraction of the requests."""

from __future__ import annotations

from onehop.protocol.budget import FLOOR, MEMORY, SHARE, Budget
from onehop.protocol.peers import Peer


def retries(rate: int, seconds: float, budget: Budget, peer: Peer, begin: float = 0.0) -> int:
    """All of so many requests a second fail, and each is to be sent again; how many are."""
    granted, step = 0, 1.0 / rate
    for number in range(int(rate * seconds)):
        peer.calls.last += 1
        if budget.spend([peer], begin + number * step):
            peer.calls.last += 1
            granted += 1
    return granted


def test_when_everything_fails_less_than_a_fifth_more_is_sent() -> None:
    for rate in (100, 1_000, 5_000):
        requests = rate * 60
        assert retries(rate, 60.0, Budget(), Peer(b"", None)) < 0.2 * requests


def test_ten_a_second_may_always_be_sent_again() -> None:
    assert retries(10, 60.0, Budget(), Peer(b"", None)) == 600


def test_what_was_not_used_for_ten_seconds_may_be_used_at_once_and_no_more() -> None:
    budget, peer = Budget(), Peer(b"", None)
    budget.spend([peer], 0.0)
    for second in range(1, 100):
        peer.calls.last += 1_000
        budget.spend([peer], float(second))
    burst = 0
    while budget.spend([peer], 100.0):
        burst += 1
    assert SHARE * 1_000 * MEMORY * 0.8 <= burst <= SHARE * 1_000 * MEMORY + FLOOR * MEMORY


def test_a_peer_that_is_new_brings_no_budget_but_for_what_is_sent_to_it() -> None:
    budget = Budget()
    budget.spend([], 0.0)
    while budget.spend([], 0.0):
        pass
    assert not budget.spend([Peer(b"", None, first=1_000_000)], 0.05)
    granted = 0
    while budget.spend([Peer(b"", None, first=1_000_000)], 1.0):
        granted += 1
    assert granted == FLOOR


def test_a_peer_that_returns_under_its_id_brings_no_budget() -> None:
    budget, peer = Budget(), Peer(b"one", None)
    peer.calls.last = 50
    budget.spend([peer], 0.0)
    while budget.spend([peer], 0.0):
        pass
    returned = Peer(b"one", None, first=1_000_000)
    returned.calls.last = 1_000_001
    granted = 0
    while budget.spend([returned], 1.0):
        granted += 1
    assert granted == FLOOR


def test_retries_earn_no_retries() -> None:
    budget, peer = Budget(), Peer(b"", None)
    while budget.spend([peer], 0.0):
        peer.calls.last += 1
    peer.calls.last += 0
    granted = 0
    while budget.spend([peer], 1.0):
        granted += 1
    assert granted == FLOOR

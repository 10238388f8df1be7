"""Liveness: who owes an answer is asked, who gives none is avoided, and who answers is asked for work again."""

from __future__ import annotations

import pytest

from onehop.protocol import liveness as rules
from onehop.protocol import wire
from onehop.protocol.calls import REPLIED, Call, CallTable
from onehop.protocol.liveness import Findings, Liveness

ROUND = 0.5


class Watched:
    """A connection that is looked at twice a second, and what was found."""

    def __init__(self, random: float = 0.5) -> None:
        self.now = 100.0
        self.calls = CallTable()
        self.liveness = Liveness(lambda: random)
        self.asked: list[float] = []
        self.probes: list[Call] = []
        self.news: list[tuple[float, bool]] = []
        self.overdue: list[tuple[float, int]] = []

    def call(self, kind: int = wire.REQUEST) -> Call:
        call = Call(kind)
        self.calls.begin(call)
        return call

    def look(self) -> Findings:
        findings = self.liveness.look(self.calls, self.now)
        if findings.ask is not None:
            ping, echo = Call(wire.PING), Call(wire.PING)
            for each in (ping, echo):
                self.calls.begin(each)
            self.probes += [ping, echo]
            self.asked.append(self.now)
            self.liveness.asked(findings.ask, ping, echo, self.now)
        if findings.answers is not None:
            self.news.append((self.now, findings.answers))
        if findings.overdue:
            self.overdue.append((self.now, findings.overdue))
        return findings

    def run(self, seconds: float, *, ping: bool = False, echo: bool = False) -> None:
        """Let time pass; the peer answers the questions of these kinds."""
        until = self.now + seconds
        while self.now < until:
            self.look()
            for index, probe in enumerate(self.probes):
                if (echo if index % 2 else ping) and probe.outcome is None:
                    self.answer(probe)
            self.now += ROUND

    def answer(self, call: Call) -> None:
        del self.calls.pending[call.id]
        call.outcome = REPLIED

    def let_time_out(self, waited: float = 1.0) -> bool:
        call = self.call()
        self.calls.give_up(call)
        return self.liveness.timed_out(self.calls, call, waited, self.now)


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_a_peer_that_owes_nothing_is_not_asked(watched: Watched) -> None:
    watched.run(30.0)
    assert watched.asked == []


def test_a_peer_that_answers_within_a_second_is_not_asked(watched: Watched) -> None:
    for _ in range(20):
        call = watched.call()
        watched.run(ROUND)
        watched.answer(call)
    assert watched.asked == []


@pytest.mark.parametrize("kind", [wire.REQUEST, wire.CAST])
def test_a_peer_that_owes_an_answer_for_a_second_is_asked(watched: Watched, kind: int) -> None:
    watched.call(kind)
    watched.run(2.0, ping=True, echo=True)
    assert watched.asked == [100.0 + rules.QUIET]


def test_a_long_call_is_asked_about_every_two_seconds_and_its_peer_is_not_stalled(watched: Watched) -> None:
    watched.call()
    watched.run(61.0, ping=True, echo=True)
    assert len(watched.asked) == 30
    assert watched.news == []
    assert watched.overdue == []


@pytest.mark.parametrize(("ping", "echo"), [(False, False), (True, False), (False, True)])
def test_who_does_not_answer_one_of_the_questions_is_stalled_within_six_seconds(ping: bool, echo: bool) -> None:
    watched = Watched()
    watched.run(0.4)
    watched.call()
    watched.run(10.0, ping=ping, echo=echo)
    [(when, answers), *_] = watched.news
    assert not answers
    assert when - 100.0 <= 6.0
    assert watched.liveness.stalled
    assert len(watched.asked) == 1, "one question at a time"


def test_who_answers_the_question_at_last_is_stalled_no_more(watched: Watched) -> None:
    watched.call()
    watched.run(20.0, ping=True)
    for probe in watched.probes:
        if probe.outcome is None:
            watched.answer(probe)
    watched.look()
    assert [answers for _, answers in watched.news] == [False, True]
    assert not watched.liveness.stalled


def test_calls_of_a_peer_that_answers_no_ping_are_given_up_within_seven_seconds_each(watched: Watched) -> None:
    first = watched.call()
    watched.run(3.0)
    second = watched.call()
    watched.run(3.5)
    assert all(first.id <= number < second.id for _, number in watched.overdue)
    assert watched.overdue[0][0] - 100.0 <= 7.0
    watched.run(2.0)
    assert watched.overdue[-1][1] >= second.id
    assert watched.overdue[-1][0] - 103.0 <= 7.0


def test_calls_of_a_peer_whose_workers_alone_hang_go_on(watched: Watched) -> None:
    watched.call()
    watched.run(60.0, ping=True)
    assert watched.overdue == []


def test_a_peer_is_not_blamed_for_the_time_in_which_nobody_looked(watched: Watched) -> None:
    watched.call()
    watched.run(2.0)
    watched.now += 30.0
    watched.liveness.excuse(30.0 - ROUND)
    watched.look()
    assert (watched.news, watched.overdue) == ([], [])
    for probe in watched.probes:
        watched.answer(probe)
    watched.run(1.0, ping=True, echo=True)
    assert (watched.news, watched.overdue) == ([], [])


def test_who_lets_five_calls_reach_their_deadline_is_stalled(watched: Watched) -> None:
    assert [watched.let_time_out() for _ in range(rules.TIMEOUTS)] == [False] * (rules.TIMEOUTS - 1) + [True]
    assert watched.liveness.stalled
    assert not watched.let_time_out(), "that is no news"


def test_a_reply_between_them_makes_timeouts_begin_anew(watched: Watched) -> None:
    for _ in range(3):
        for _ in range(rules.TIMEOUTS - 1):
            assert not watched.let_time_out()
        watched.calls.replies += 1
    assert not watched.liveness.stalled


def test_a_deadline_too_short_says_nothing_of_the_peer(watched: Watched) -> None:
    assert not any(watched.let_time_out(rules.SHORTEST / 2) for _ in range(100))


def test_who_was_avoided_for_timeouts_is_asked_when_its_time_is_over_and_returns_when_it_answers() -> None:
    watched = Watched(random=0.5)
    for _ in range(rules.TIMEOUTS):
        watched.let_time_out()
    watched.run(rules.FIRST_BAN + 1.0, ping=True, echo=True)
    assert watched.asked == [100.0 + rules.FIRST_BAN]
    [(when, answers)] = watched.news
    assert answers
    assert when == 100.0 + rules.FIRST_BAN + ROUND


def test_who_was_avoided_for_timeouts_and_does_not_answer_stays_so(watched: Watched) -> None:
    for _ in range(rules.TIMEOUTS):
        watched.let_time_out()
    watched.run(60.0, ping=True)
    assert watched.liveness.stalled


def bans(pauses: list[float], random: float = 0.5) -> list[float]:
    """How long a peer is avoided, each time it lets calls wait again so many seconds after it came back."""
    watched, found = Watched(random), []
    for pause in pauses:
        watched.now += pause
        began = watched.now
        for _ in range(rules.TIMEOUTS):
            watched.let_time_out()
        while watched.liveness.stalled:
            watched.run(ROUND, ping=True, echo=True)
        found.append(watched.news[-1][0] - began)
    return found


def test_it_is_avoided_twice_as_long_each_time_up_to_a_limit() -> None:
    found = bans([1.0] * 9)
    assert found == sorted(found)
    assert [round(each) for each in found[:4]] == [6, 10, 20, 40]
    assert found[-1] <= rules.LONGEST_BAN + 1.0


def test_it_is_forgiven_when_it_has_answered_for_a_minute() -> None:
    first, _, third = bans([1.0, 1.0, rules.FORGIVEN + 1.0])
    assert third == first


def test_the_time_for_which_it_is_avoided_is_jittered() -> None:
    assert bans([1.0], random=0.0)[0] < bans([1.0], random=0.99)[0]


def test_a_hello_that_waits_is_no_call_to_ask_about(watched: Watched) -> None:
    watched.calls.pending[0] = Call(wire.HELLO)
    watched.run(5.0)
    assert watched.asked == []

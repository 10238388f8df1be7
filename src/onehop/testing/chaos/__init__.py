"""Chaos: servers and callers as real processes, faults drawn from a seed, and a ledger that has to balance.

:mod:`~onehop.testing.chaos.programs` has the processes, :mod:`~onehop.testing.chaos.plan` the faults,
:mod:`~onehop.testing.chaos.cluster` starts and disturbs them, :mod:`~onehop.testing.chaos.figures` says what came of
it. From the command line: ``onehop chaos``.
"""

"""The sans-IO core: what onehop decides, without a socket, a clock, a thread, a lock or a random number.

Time arrives as ``now`` (seconds on a monotonic clock of the caller's choice), randomness as numbers, frames as
bytes. Hot functions return what is to be done; cold ones append to lists which the engine drains.
"""

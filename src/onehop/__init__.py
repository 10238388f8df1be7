"""Brokerless RPC between Python processes, peer to peer on ZeroMQ."""

__version__ = "0.1.0"

"""The plug-in's own fixture, also where onehop is on the path and not installed."""

from onehop.testing.plugin import world

__all__ = ["world"]

"""Where records live: the registries, chosen by the scheme of a URL."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import cast

from onehop.errors import SettingsError
from onehop.interfaces import Registry
from onehop.settings import Settings, redacted

ENTRY_POINTS = "onehop.registries"

# Ours are found without installed metadata, and nobody else's can take their place.
_OURS = {
    "local": "onehop.registry.local:LocalRegistry",
    "hosts": "onehop.registry.hosts:HostsRegistry",
    "file": "onehop.registry.hosts:HostsRegistry",
    "zookeeper": "onehop.registry.zookeeper:open_registry",
    "etcd": "onehop.registry.etcd:open_registry",
    "redis": "onehop.registry.redis:open_registry",
}


def open_registry(url: str, settings: Settings) -> Registry:
    """The registry that ``url`` names; nothing is touched before its first use.

    Args:
        url: a URL whose scheme names a registry, or that name alone, such as ``"local"``. Others than onehop's own
            are found through the entry points ``onehop.registries``: callables that take settings and the URL.
        settings: the node's settings.

    Raises:
        SettingsError: no registry has that name, it cannot be imported, or the rest of the URL is wrong.
    """
    scheme = re.split(r":|$", url, maxsplit=1)[0].lower()
    known = _OURS if scheme in _OURS else _installed() | _OURS
    if scheme not in known:
        raise SettingsError(
            f"registry is {redacted(url)!r}; it must be, or be a URL that begins with: {', '.join(sorted(known))}"
        )
    try:
        module, _, name = known[scheme].partition(":")
        make = cast(Callable[[Settings, str], Registry], getattr(import_module(module), name))
    except (ImportError, AttributeError) as error:
        shown = redacted(url)
        raise SettingsError(f"registry {shown!r} needs {known[scheme]}, which cannot be imported: {error}") from error
    return make(settings, url)


def _installed() -> dict[str, str]:
    """Registries of others, by scheme."""
    from importlib import metadata  # two megabytes, which the ordinary program never needs

    return {each.name: each.value for each in metadata.entry_points(group=ENTRY_POINTS)}

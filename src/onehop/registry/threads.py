"""Starting the threads of registries."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from onehop.errors import NoThread


def start_thread(name: str, target: Callable[..., Any], *arguments: Any, **keywords: Any) -> threading.Thread:
    """Start a daemon thread.

    Raises:
        NoThread: the machine gives none.
    """
    thread = threading.Thread(name=name, target=target, args=arguments, kwargs=keywords, daemon=True)
    start(thread)
    return thread


def start(thread: threading.Thread) -> None:
    """Start ``thread``; raises NoThread where the machine gives none."""
    try:
        thread.start()
    except RuntimeError as error:
        raise NoThread.told(thread.name, error) from None

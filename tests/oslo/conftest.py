"""What the tests of the driver share."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # oslo.service and futurist import eventlet where it is installed, and eventlet warns of itself.
    warnings.simplefilter("ignore")
    import oslo_messaging
    import oslo_messaging.notify  # noqa: F401

"""The limit of descriptors of this process: what is left of it, and who may use that."""

from __future__ import annotations

import os
import resource

from onehop.errors import ResourceLimit

RESERVED_DESCRIPTORS = 64
"""Left to the program: no link is opened when fewer are free. Where none is, libzmq aborts the process, or spins."""
LARGEST_RESERVE = 1024
LARGEST_LIMIT = 65_536
"""To which the soft limit is raised, at most, unless more are needed."""


def _used_descriptors(enough: int) -> int:
    """How many descriptors are open; or a number above that, where ``enough`` is above both.

    A list of them takes milliseconds where many are open, and this is asked for every link.
    """
    try:
        used = os.stat("/proc/self/fd").st_size  # since Linux 6.2, else 0
        if used == 0:
            with open("/proc/self/status", "rb") as status:
                used = next(int(line.split()[1]) for line in status if line.startswith(b"FDSize:"))  # slots for them
            if used > enough:
                used = len(os.listdir("/proc/self/fd"))
    except FileNotFoundError:
        return 0
    except OSError:  # there is not even one to count the others
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return used


def free_descriptors() -> int:
    """How many more descriptors this process may open below its soft limit; told too low where that is far."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return LARGEST_LIMIT
    return soft - _used_descriptors(soft - 2 * listening_reserve())  # exactly, where that matters


def listening_reserve() -> int:
    """How many are left free by who listens: a crowd may take hundreds before it is noticed that it comes."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return (
        LARGEST_RESERVE
        if hard == resource.RLIM_INFINITY
        else max(RESERVED_DESCRIPTORS, min(hard // 2, LARGEST_RESERVE))
    )


def check_descriptors(wanted: int) -> None:
    """Make sure that ``wanted`` more descriptors may be opened, raising the soft limit if that helps.

    Raises:
        ResourceLimit: they would leave the program fewer than it needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    used = _used_descriptors(soft - wanted - RESERVED_DESCRIPTORS)
    needed = used + wanted + RESERVED_DESCRIPTORS
    if needed <= soft:
        return
    if hard == resource.RLIM_INFINITY or needed <= hard:
        raised = max(needed, min(hard, LARGEST_LIMIT)) if hard != resource.RLIM_INFINITY else max(needed, LARGEST_LIMIT)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            return
        except (ValueError, OSError):
            hard = soft
    raise ResourceLimit(
        f"this process has {used} of {soft} descriptors open; {wanted} more are needed, with {RESERVED_DESCRIPTORS} in "
        "reserve: raise the limit (ulimit -n, or LimitNOFILE= in its systemd unit)"
    )

"""The registry of one host: a directory with one locked file a node.

The lock says that the record holds: the kernel drops it when the process dies, however it dies. It is a lock of
``flock``, which belongs to the open file and not to the process, so that several nodes of one process can look at
each other's files (closing any descriptor of a file drops a process's POSIX locks on it).
"""

from __future__ import annotations

import errno
import fcntl
import grp
import logging
import os
import select
import socket
import stat
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import msgspec

from onehop.errors import NoThread, OnehopError, RegistryError, SettingsError
from onehop.interfaces import Deliver, Record, Registry
from onehop.registry.inotify import Changes, Inotify
from onehop.registry.threads import start_thread
from onehop.settings import Settings, redacted

RECORD_LIMIT = 1024 * 1024  # bytes of one record
SOCKET_PATH_LIMIT = 107  # bytes of a path that a Unix socket can have
FULL_LOOK_PERIOD = 2.0  # seconds between two looks at everything, beside inotify's notices; at least,
FULL_LOOK_PERIOD_PER_RECORD = 0.04  # and this for each record, so that many cost no more than 50
POLL_PERIOD = 0.2  # the same without inotify; at least,
POLL_PERIOD_PER_RECORD = 0.0002  # and this for each record that a node of this process looks at
_DOUBT_PERIOD, _DOUBT_LOOKS = 0.02, 4
_REST, _LONGEST_REST = 4.0, 1.0  # after a look: times as long as it took, seconds; many who come are seen together
_YOUNG = 10.0  # seconds
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)

_log = logging.getLogger(__name__)

_Signature = tuple[int, int, int]  # inode, change in nanoseconds, size: a file that keeps them is not read again


def run_directory(settings: Settings) -> Path:
    """The directory for sockets and records: the one that is set, else the first of three that this process can use.

    They are ``$XDG_RUNTIME_DIR/onehop``, ``/run/onehop`` and ``/tmp/onehop-<uid>``. Nothing is made here.
    """
    if settings.run_directory:
        return Path(settings.run_directory).absolute()
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(session) and os.path.isdir(session):
        return Path(session, "onehop")
    system = Path("/run/onehop")
    if os.access(system if system.exists() else system.parent, os.W_OK | os.X_OK, effective_ids=True):
        return system
    return Path(f"/tmp/onehop-{os.geteuid()}")


def remove_dead_sockets(directory: Path) -> None:
    """Remove the sockets of killed nodes from ``directory``, where no record here says whose they were.

    Nobody listens at such a socket. One that was made just now may not be listened at yet, and is left alone.
    """
    for path in directory.glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            # By the wall clock, as the file's time is: where that has jumped, a file may seem to come from the future.
            if not path.is_socket() or 0 <= time.time() - path.stat().st_mtime < _YOUNG:
                continue
            probe.setblocking(False)
            if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()


class LocalRegistry(Registry):
    """Records of one host and one realm, as files ``<node id>.json`` in :attr:`directory`.

    A record whose lock can be had belongs to a dead process: it is not delivered, and whoever notices removes it
    with the sockets it names. Changes are seen within 0.3 s, as a rule at once.

    Args:
        settings: ``run_directory``, ``realm`` and ``group`` say where, and who shares it.
        url: ``"local"``.
        inotify: whether to let the kernel tell of changes; where it cannot, the directory is read every 0.2 s.

    Attributes:
        skipped: files that are not records, with what is wrong with each.

    Raises:
        SettingsError: the URL says more than ``local``.
    """

    def __init__(self, settings: Settings, url: str = "local", *, inotify: bool = True) -> None:
        if url.rstrip(":/") != "local":
            raise SettingsError(
                f"registry is {redacted(url)!r}; it must be 'local' alone: its place is the setting run_directory"
            )
        self.skipped: dict[str, str] = {}
        self._settings = settings
        self._wants_inotify = inotify
        self._closed = False
        self._record: Record | None = None
        self._held: int | None = None  # descriptor of our own record: the lock
        self._deliver: Deliver | None = None
        self._view: tuple[Record, ...] | None = None
        self._known: dict[str, tuple[_Signature, Record | str]] = {}  # by file name; a str says what is wrong
        self._watch: _Watch | None = None
        self._looker: int | None = None
        self._look_again = False
        self._cannot_look = ""
        self._prepared: Path | None = None

    # --- the directory ---

    @property
    def directory(self) -> Path:
        """Where this realm's records and sockets are. :meth:`prepare` makes it. The empty realm is ``default``."""
        if self._prepared is not None:
            return self._prepared
        realm = quote(self._settings.realm, safe="", errors="surrogatepass") or "default"
        if realm.startswith("."):
            realm = "%2E" + realm[1:]
        return run_directory(self._settings) / realm

    def prepare(self) -> Path:
        """Make the directory with the right owner and mode, or check them; returns it.

        Raises:
            RegistryError: it cannot be made or used, or others than its owner and group could write to it.
            SettingsError: its path is too long for a socket, or there is no such group.
        """
        directory = self.directory
        length = len(os.fsencode(directory / ("0" * 16 + ".sock")))
        if length > SOCKET_PATH_LIMIT:
            raise SettingsError(
                f"sockets in {directory} would have paths of {length} bytes; the system allows {SOCKET_PATH_LIMIT}: "
                f"choose a shorter run_directory (ONEHOP_RUN_DIRECTORY) or realm"
            )
        group = _group(self._settings.group)
        try:
            directory.parent.parent.mkdir(parents=True, exist_ok=True)
            for each in (directory.parent, directory):
                self._make(each, group)
        except OSError as error:
            raise RegistryError(f"{directory} cannot be used as run directory: {error.strerror}; {_ADVICE}") from error
        self._prepared = directory
        return directory

    def _make(self, path: Path, group: int | None) -> None:
        try:
            path.mkdir(mode=0o700)
            made = True
        except FileExistsError:
            made = False
        # A link is followed only where a person named the directory: in /tmp it may be another user's.
        follow = bool(self._settings.run_directory)
        found = path.stat(follow_symlinks=follow)
        ours = found.st_uid == os.geteuid()
        if not stat.S_ISDIR(found.st_mode):
            raise RegistryError(f"{path} is not a directory; {_ADVICE}")
        if group is not None and ours and (found.st_gid != group or stat.S_IMODE(found.st_mode) != 0o2770):
            os.chown(path, -1, group)
            path.chmod(0o2770)  # files made in it get its group
        elif made:
            path.chmod(0o700)  # whatever the umask
        found = path.stat(follow_symlinks=follow)
        foreign = not ours and (group is None or found.st_gid != group)
        writable_by = stat.S_IWOTH | (stat.S_IWGRP if group is None else 0)
        if foreign:
            raise RegistryError(
                f"{path} belongs to user {found.st_uid} and group {found.st_gid}, and this process runs as user "
                f"{os.geteuid()}; {_ADVICE}"
            )
        if found.st_mode & writable_by:
            raise RegistryError(f"{path} can be written to by others (mode {stat.S_IMODE(found.st_mode):o}); {_ADVICE}")
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            raise RegistryError(f"{path} does not let this process write to it; {_ADVICE}")

    # --- our own record ---

    def announce(self, record: Record) -> None:
        if len(record.node) != 32 or record.node.strip("0123456789abcdef"):
            raise RegistryError(f"a record's node is {record.node!r}; it must be 32 lower-case hexadecimal digits")
        with self._lock("publishing"):
            self._check_open()
            before = self._record
            self._publish(self.prepare(), record)
            if before is not None and before.node != record.node:
                _unlink(self.directory / f"{before.node}.json")

    def _publish(self, directory: Path, record: Record) -> None:
        data = msgspec.json.encode(record)
        if len(data) > RECORD_LIMIT:
            raise RegistryError(f"the record of node {record.node} has {len(data)} bytes; it may have {RECORD_LIMIT}")
        temporary, path = directory / f".{record.node}.tmp", directory / f"{record.node}.json"
        mode = 0o640 if self._settings.group else 0o600
        while True:
            descriptor = -1
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
                os.fchmod(descriptor, mode)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                with open(descriptor, "wb", closefd=False) as file:
                    file.write(data)
                os.rename(temporary, path)
            except OSError as error:
                if descriptor >= 0:
                    os.close(descriptor)
                if isinstance(error, FileNotFoundError) and descriptor >= 0:
                    continue  # somebody took the file for a leftover in the moment before it was locked
                raise RegistryError(f"{path} cannot be written: {error.strerror}; {_ADVICE}") from error
            break
        self._record, before, self._held = record, self._held, descriptor
        if before is not None:
            os.close(before)

    def withdraw(self) -> None:
        with self._lock("publishing"):
            if self._record is not None:
                _unlink(self.directory / f"{self._record.node}.json")
            if self._held is not None:
                os.close(self._held)
            self._record = self._held = None

    def _restore(self, directory: Path) -> None:
        """Publish our record again if somebody removed its file."""
        with self._lock("publishing"):
            if self._record is None or self._held is None:
                return
            try:
                found = os.stat(directory / f"{self._record.node}.json").st_ino
            except FileNotFoundError:
                found = -1
            if found != os.fstat(self._held).st_ino:
                self._publish(directory, self._record)

    # --- everybody's records ---

    def watch(self, deliver: Deliver) -> None:
        self._check_open()
        directory = self.prepare()
        if self._watch is None:
            # Before the first look, so that nothing happens unseen between the two.
            self._watch = _join(self, directory, self._wants_inotify)
        with self._looking():
            self._deliver, self._view = deliver, None
        self._look()
        try:
            self._watch.start()
        except NoThread:
            watch, self._watch, self._deliver = self._watch, None, None
            _part(self, watch)
            raise

    def refresh(self) -> None:
        if self._deliver is not None:
            self._look()

    def is_fresh(self) -> bool:
        watch = self._watch
        if self._deliver is None or watch is None:
            return self._deliver is None
        return self._view is not None and not self._cannot_look and watch.has_seen_all()

    def _look(self, names: Iterable[str] | None = None) -> None:
        """Look at the files of these names, or at all, and deliver the view if it is another."""
        if self._looker == threading.get_ident():  # called by deliver: the look under way does it
            self._look_again = True
            return
        with self._looking():
            while (deliver := self._deliver) is not None:
                self._look_again = False
                if names is None:
                    names = self._all_names()
                elif self._record is not None and f"{self._record.node}.json" in names:
                    self._restore(self.directory)
                for name in names:
                    self._examine(name)
                records = (record for _, record in self._known.values() if isinstance(record, Record))
                view = tuple(sorted(records, key=lambda record: record.node))
                if view != self._view:
                    self._view = view
                    deliver(view)
                if not self._look_again:
                    return
                names = None

    def _all_names(self) -> Iterable[str]:
        """Names of all records, here now or before; also mends what was taken from us."""
        directory = self.directory
        try:
            if not directory.is_dir():
                self.prepare()
            self._restore(directory)
            found = set(os.listdir(directory))
        except (OSError, OnehopError) as error:
            if str(error) != self._cannot_look:
                _log.warning("local records cannot be looked at, the last view is kept: %s", error)
            self._cannot_look = str(error)
            return ()
        self._cannot_look = ""
        for name in found:
            if name.startswith(".") and name.endswith(".tmp"):
                self._remove_leftover(directory / name)
        return {name for name in found if name.endswith(".json")} | self._known.keys()

    def _examine(self, name: str) -> None:
        path = f"{self.directory}/{name}"
        watch = self._watch
        read = {} if watch is None else watch.read
        signature: _Signature = (0, 0, 0)
        content: Record | str | None
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            content = None
        except OSError as error:
            if error.errno in _OUT_OF_RESOURCES:
                self._cannot_look = str(error)
                return  # what is known of it stays
            content = f"it cannot be opened: {error.strerror}"
        else:
            try:
                found = os.fstat(descriptor)
                signature = (found.st_ino, found.st_ctime_ns, found.st_size)
                known = self._known.get(name) or read.get(name)
                content = known[1] if known and known[0] == signature else _content(name, descriptor, found)
                read[name] = signature, content
                if isinstance(content, Record) and _can_lock(descriptor):
                    self._remove_stale(Path(path), content, found.st_ino)
                    content = None
            finally:
                os.close(descriptor)

        if content is None:
            self._known.pop(name, None)
            read.pop(name, None)
        else:
            self._known[name] = (signature, content)
        if isinstance(content, str):
            if name not in self.skipped:
                _log.warning("%s is not a node's record and is skipped: %s", path, content)
            self.skipped[name] = content
        else:
            self.skipped.pop(name, None)

    def _remove_stale(self, path: Path, record: Record, inode: int) -> None:
        """Remove a dead node's file and sockets.

        The caller holds a lock on the file. If the path still leads to it nobody can put another in its place: only
        the node itself would, and it lives as long as its lock.
        """
        try:
            if os.lstat(path).st_ino != inode:
                return  # announced again between opening and locking; the kernel tells of that file by itself
        except FileNotFoundError:
            return
        for endpoint in record.endpoints:
            place = Path(endpoint.removeprefix("ipc://"))
            if endpoint.startswith("ipc://") and place.parent == path.parent and place.is_socket():
                _unlink(place)
        _unlink(path)

    def _remove_leftover(self, path: Path) -> None:
        """Remove the unfinished file of a process that died while it announced."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return  # finished in the meantime, or not ours to touch
        try:
            if _can_lock(descriptor) and os.lstat(path).st_ino == os.fstat(descriptor).st_ino:
                _unlink(path)
        except FileNotFoundError:
            pass
        finally:
            os.close(descriptor)

    # --- the end ---

    def close(self) -> None:
        self._closed = True
        self._deliver = None
        watch, self._watch = self._watch, None
        if watch is not None:
            _part(self, watch)
            if self._looker != threading.get_ident():
                # A look under way may deliver once more; not for ever: it may wait for a lock of whoever closes.
                looking = self._lock("looking")
                if looking.acquire(timeout=1.0):
                    looking.release()
        self.withdraw()

    def forget(self) -> None:
        # No lock is taken: the parent's thread that held it does not exist here. Closing a descriptor that a fork
        # copied leaves the parent's lock alone.
        self._closed = True
        self._deliver = self._record = None
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.forget(self)
        held, self._held = self._held, None
        if held is not None:
            os.close(held)
        for name in ("publishing", "looking"):
            self.__dict__.pop(f"_{name}_lock", None)

    # --- inside ---

    def _check_open(self) -> None:
        if self._closed:
            raise RegistryError("this registry was closed, or belongs to the parent of this process; open another")
        _in_use.add(self)

    def _lock(self, name: str) -> threading.Lock:
        # Made at first use, to be a green one where threads are; setdefault lets one of two threads win.
        lock: threading.Lock = self.__dict__.setdefault(f"_{name}_lock", threading.Lock())
        return lock

    @contextmanager
    def _looking(self) -> Iterator[None]:
        with self._lock("looking"):
            self._looker = threading.get_ident()
            try:
                yield
            finally:
                self._looker = None


class _Watch:
    """The thread that waits for changes of one directory, for all nodes of this process that watch it.

    The system has few inotify instances (``fs.inotify.max_user_instances``, often 128), and a process may have more
    nodes than that.

    Attributes:
        registries: for which it waits; changed under the lock ``_sharing``.
        read: what any of them has read, so that the others need not.
    """

    def __init__(self, directory: Path, *, inotify: bool) -> None:
        self.registries: tuple[LocalRegistry, ...] = ()
        self.read: dict[str, tuple[_Signature, Record | str]] = {}
        self._directory = directory
        self._seen_all = True
        self._process = os.getpid()
        self._forgotten = False
        self._thread: threading.Thread | None = None
        self._inotify: Inotify | None = None
        self._end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable: the thread is to end
        if inotify:
            try:
                self._inotify = Inotify()
                self._inotify.watch(directory)
            except OSError as error:
                _log.info("no inotify for %s, it is read every %s s: %s", directory, POLL_PERIOD, error)
                if self._inotify is not None:
                    self._inotify.close()
                self._inotify = None

    def start(self) -> None:
        """Start the thread, if it does not run."""
        with _sharing():
            if self._thread is None:
                self._thread = start_thread("onehop-registry", self._run)

    def has_seen_all(self) -> bool:
        """Whether whatever happened before this was asked has been looked at, and delivered. Never waits.

        The kernel queues a notice before the change that it tells of is through. So it is in the queue still; or the
        thread has read it, which owned up to having something to look at before it did.
        """
        if self._inotify is None:
            return False
        try:
            return self._inotify.is_quiet() and self._seen_all and self._inotify.watches(self._directory)
        except OSError:  # the directory is gone, or the watch was given back meanwhile
            return False

    def stop(self) -> None:
        """End the thread; nobody is watching any more."""
        if self._thread is None:
            self._release()
            return
        os.eventfd_write(self._end, 1)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)  # not for ever: deliver may wait for a lock of whoever closes

    def forget(self, registry: LocalRegistry) -> None:
        """Let go of what a fork inherited."""
        if self._process == os.getpid():
            _part(registry, self)
        elif not self._forgotten:
            self._forgotten = True
            self._release()

    def _release(self) -> None:
        os.close(self._end)
        if self._inotify is not None:
            self._inotify.close()

    def _run(self) -> None:
        full_look_at, missed = time.monotonic() + self._period(), False
        # Closed by a process that held it: the kernel tells just before it drops the lock, so a lock that is still
        # there is looked at a few times more.
        doubtful: dict[str, int] = {}
        descriptors = [self._end] if self._inotify is None else [self._end, self._inotify.descriptor]
        rest = 0.0
        while True:
            try:
                self._wait(rest, [self._end])
                timeout = max(0.0, full_look_at - time.monotonic())
                ready = self._wait(min(timeout, _DOUBT_PERIOD) if doubtful else timeout, descriptors)
            except (OSError, ValueError):
                if self._forgotten:  # green threads survive a fork; this one belongs to the parent
                    return
                raise
            if self._forgotten:
                return
            if self._end in ready:
                self._release()
                return
            self._seen_all = False
            changes = self._inotify.read() if self._inotify and self._inotify.descriptor in ready else _NOTHING
            names = {name for name in (*changes.names, *changes.closed, *doubtful) if name.endswith(".json")}
            doubtful = {name: left - 1 for name, left in doubtful.items() if left > 1}
            doubtful |= {name: _DOUBT_LOOKS for name in changes.closed if name.endswith(".json")}
            began = time.monotonic()
            if changes.incomplete or began >= full_look_at:
                full_look_at = time.monotonic() + POLL_PERIOD
                watches = self._watches_again()  # before the look, so that nothing happens unseen between the two
                missed = not (self._look(None) and watches and not changes.incomplete)
                if not missed:
                    full_look_at = time.monotonic() + self._period()
            elif names and not self._look(names):
                missed, full_look_at = True, min(full_look_at, began + POLL_PERIOD)
            self._seen_all = not (missed or doubtful)
            rest = min(_REST * (time.monotonic() - began), _LONGEST_REST)

    def _look(self, names: Iterable[str] | None) -> bool:
        """Have each registry look at these names, or at all; whether that went well."""
        went_well = True
        for registry in self.registries:
            try:
                registry._look(names)
            except Exception:
                went_well = False
                _log.exception("a look at the records in %s failed; another follows", self._directory)
        return went_well

    def _period(self) -> float:
        known = [len(registry._known) for registry in self.registries]
        if self._inotify is None:
            return max(POLL_PERIOD, POLL_PERIOD_PER_RECORD * sum(known))
        return max(FULL_LOOK_PERIOD, FULL_LOOK_PERIOD_PER_RECORD * max(known, default=0))

    def _watches_again(self) -> bool:
        """Watch the directory anew, as it may be another of that name by now; whether that went well."""
        try:
            if self._inotify is not None:
                self._inotify.watch(self._directory)
        except OSError:
            return False
        return True

    def _wait(self, timeout: float, descriptors: list[int]) -> list[int]:
        if not hasattr(select, "poll"):  # a patch for green threads removes it
            return list(select.select(descriptors, (), (), timeout)[0])
        poll = select.poll()
        for each in descriptors:
            poll.register(each, select.POLLIN)
        return [descriptor for descriptor, _ in poll.poll(timeout * 1000 + 1)]


_NOTHING = Changes(set(), set(), False)
_ADVICE = "set ONEHOP_RUN_DIRECTORY to a directory that this user alone can write to, or set a group that shares it"

# A forked child that never touches onehop would keep its parent's record locked after the parent's death.
_in_use: weakref.WeakSet[LocalRegistry] = weakref.WeakSet()
_watches: dict[tuple[Path, bool], _Watch] = {}
_shared: dict[str, threading.Lock] = {}


def _sharing() -> threading.Lock:
    return _shared.setdefault("lock", threading.Lock())  # as LocalRegistry._lock


def _join(registry: LocalRegistry, directory: Path, inotify: bool) -> _Watch:
    """The watch of ``directory``, which waits for ``registry`` too from now on."""
    with _sharing():
        watch = _watches.get((directory, inotify))
        if watch is None:
            watch = _watches[directory, inotify] = _Watch(directory, inotify=inotify)
        watch.registries += (registry,)
        return watch


def _part(registry: LocalRegistry, watch: _Watch) -> None:
    """Let ``watch`` wait for ``registry`` no more, and end it where that was the last."""
    with _sharing():
        watch.registries = tuple(each for each in watch.registries if each is not registry)
        last = not watch.registries
        if last:
            for key in [key for key, each in _watches.items() if each is watch]:
                del _watches[key]
    if last:
        watch.stop()


def _forget_all() -> None:
    _shared.clear()  # the parent's thread that held it does not exist here
    _watches.clear()
    for registry in list(_in_use):
        registry.forget()
    _in_use.clear()


os.register_at_fork(after_in_child=_forget_all)


def _group(name: str) -> int | None:
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise SettingsError(f"group is {name!r}, which this host does not have; name one of /etc/group") from None


def _content(name: str, descriptor: int, found: os.stat_result) -> Record | str:
    """The record in an open file, or what is wrong with it."""
    if not stat.S_ISREG(found.st_mode):
        return "it is not a regular file"
    if found.st_size > RECORD_LIMIT:
        return f"it has {found.st_size} bytes, and a record has at most {RECORD_LIMIT}"
    try:
        record = msgspec.json.decode(os.read(descriptor, found.st_size + 1), type=Record)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        return f"it does not hold a record: {error}"
    if name != f"{record.node}.json":
        return f"it holds the record of node {record.node!r}"
    return record


def _can_lock(descriptor: int) -> bool:
    """Whether nobody holds the file. The lock is shared, so that two who ask at once get the same answer."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # somebody holds it; or the system has no lock left to give, which says nothing
        return False
    return True


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        if path.exists():
            _log.debug("%s cannot be removed: %s", path, error)

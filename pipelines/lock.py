"""Advisory locks that end with their holder, a killed one included."""

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.2  # how often a lock that is waited for is tried


@dataclass(frozen=True)
class Lock:
    """A lock held through an open file; the kernel gives it back when the process dies. As a
    context manager it is released at the block's end."""

    file: int

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def share(self) -> None:
        """Turn a lock held alone into one held with other readers."""
        fcntl.flock(self.file, fcntl.LOCK_SH)

    def release(self) -> None:
        """Give the lock back, once."""
        os.close(self.file)


def try_lock(path: Path, *, shared: bool = False) -> Lock | None:
    """The lock on `path` (made if missing), or None while somebody else's is in the way.

    Works between threads, processes and, on a file system that passes flock on (NFS does since
    Linux 2.6.12), hosts. The file stays behind: removing it would let two holders each lock one.

    Raises:
        OSError: the file system has no locks, or the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:
        os.close(file)
        raise
    return Lock(file)


def wait_lock(path: Path) -> Lock:
    """The lock on `path`, as soon as no other process holds it; errors as of `try_lock`."""
    while (lock := try_lock(path)) is None:
        time.sleep(POLL_S)
    return lock

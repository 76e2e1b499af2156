"""A child process that does not outlive its parent.

    parent                                child
    reader, writer = os.pipe()            watch_parent()
    Popen(..., pass_fds=[reader],           a thread reads PSQ_PARENT_FD; its end means that nobody
          env={PSQ_PARENT_FD: reader})      holds the writer any more: SIGTERM to ourselves, and 2 s
    keep writer open, write nothing         later a hard exit

The kernel closes the writer however the parent ends, SIGKILL included. On Linux the kernel is also
asked for a SIGTERM at the parent's death (PDEATHSIG), which works when the writer leaked into
another process. Nothing here waits or polls.

`keep_freed_memory` is for processes that take and give back frames all day, and are psq's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import MutableMapping
from typing import Final

from psq.errors import ConfigError

__all__ = [
    "EXIT_ORPHANED",
    "ORPHAN_GRACE_S",
    "PARENT_FD_ENV",
    "has_parent",
    "keep_freed_memory",
    "watch_parent",
]

PARENT_FD_ENV: Final = "PSQ_PARENT_FD"
ORPHAN_GRACE_S: Final = 2.0
EXIT_ORPHANED: Final = 128 + signal.SIGTERM
_WATCHER: Final = "psq-parent"
_PR_SET_PDEATHSIG: Final = 1
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
MAPPED_BYTES: Final = 4 << 20
"""From here on malloc maps memory for each block of its own: above any frame, below any vector."""
KEPT_BYTES: Final = 8 << 20
"""How much freed memory malloc may keep at the end of each of its heaps. (64 MiB: no faster.)"""


def watch_parent(environ: MutableMapping[str, str] | None = None) -> bool:
    """End this process when the parent that set PSQ_PARENT_FD does; commands call it first.

    The variable is removed, so that processes started from here do not take the descriptor for
    theirs.

    Args:
        environ: where to look, by default this process's environment.

    Returns:
        Whether there is a parent to watch.

    Raises:
        ConfigError: the variable does not name an open descriptor.
    """
    text = (os.environ if environ is None else environ).pop(PARENT_FD_ENV, "")
    if not text:
        return False
    try:
        parent_fd = int(text)
        os.set_inheritable(parent_fd, False)  # noqa: FBT003 - the standard library's signature
    except (ValueError, OSError) as error:
        msg = (
            f"{PARENT_FD_ENV}={text!r} names no open descriptor ({error}): "
            "it is set by psq launch for its own children; unset it"
        )
        raise ConfigError(msg) from error
    _ask_kernel()
    thread = threading.Thread(target=_wait_for_end, args=(parent_fd,), name=_WATCHER, daemon=True)
    thread.start()
    return True


def has_parent() -> bool:
    """Whether `watch_parent` found a parent that this process must not outlive."""
    return any(thread.name == _WATCHER for thread in threading.enumerate())


def keep_freed_memory() -> bool:
    """Let malloc keep the memory of frames for the next ones; first of all in psq's own processes.

    glibc by default gives it back to the kernel with each frame, and for the next one the kernel
    clears its pages again: up to a tenth of the CPU of a step. Whoever has set glibc's own
    variables has decided otherwise.

    Returns:
        Whether this libc can be told, and was.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    import ctypes  # noqa: PLC0415 - as below

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, MAPPED_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES))
    return all([mallopt(option, value) == 1 for option, value in settings])  # noqa: C419 - do both


def _ask_kernel() -> None:
    """Ask Linux for a SIGTERM when the parent dies; elsewhere the pipe alone must do."""
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - 10 ms, for children of psq launch only

        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _wait_for_end(parent_fd: int) -> None:
    with contextlib.suppress(OSError):  # the descriptor went away under us: the same as its end
        while os.read(parent_fd, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(ORPHAN_GRACE_S)
    os._exit(EXIT_ORPHANED)

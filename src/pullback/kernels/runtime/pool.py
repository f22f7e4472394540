"""run(n, worker, arguments, scratch): the caller and up to n - 1 threads of a small pool call one compiled worker.

Workers take tasks from a counter in the arguments until none is left, so a thread that comes late finds nothing to
do; the caller does not wait for threads that have not started. ctypes releases the GIL during a call. Scratch memory
belongs to the thread, arguments to the call: nothing that changes is shared. A forked child starts with an empty
pool.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from queue import SimpleQueue
from typing import Any


class _Job:
    """One call that threads may join until the caller has finished its own share."""

    __slots__ = ("active", "arguments", "done", "lock", "open", "scratch", "worker")

    def __init__(self, worker: Any, arguments: int, scratch: int) -> None:
        self.worker, self.arguments, self.scratch = worker, arguments, scratch
        self.lock, self.done = threading.Lock(), threading.Event()
        self.open, self.active = True, 0

    def join(self) -> None:
        """Help, unless the job is over."""
        with self.lock:
            if not self.open:
                return
            self.active += 1
        try:
            self.worker(self.arguments, scratch(self.scratch))
        finally:
            with self.lock:
                self.active -= 1
                if not self.open and not self.active:
                    self.done.set()

    def close(self) -> None:
        """Let nobody in and wait for those who are."""
        with self.lock:
            self.open = False
            wait = self.active > 0
        if wait:
            self.done.wait()


_local = threading.local()
_state: tuple[SimpleQueue[_Job], list[threading.Thread]] = (SimpleQueue(), [])
_grow = threading.Lock()


def _reset() -> None:
    """A forked child has no threads but its own, and may have inherited a lock that is held."""
    global _state, _grow, _placed
    _state, _grow, _placed = (SimpleQueue(), []), threading.Lock(), ()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)


def scratch(size: int) -> int:
    """Address of at least `size` bytes, aligned to 64, of this thread; valid until its next call."""
    if getattr(_local, "size", 0) < size:
        _local.memory = (ctypes.c_char * (size + 64))()
        _local.address = -(-ctypes.addressof(_local.memory) // 64) * 64
        _local.size = size
    return int(_local.address)


def _serve(queue: SimpleQueue[_Job]) -> None:
    while True:
        queue.get().join()


_placed: tuple[Any, ...] = ()


def _keep_apart(threads: list[threading.Thread]) -> None:
    """Keep the pool off the caller's core.

    Linux likes to wake a thread on the core of its waker and leaves it waiting there for milliseconds, behind a caller
    that computes, while other cores idle: measured 4.4 ms instead of 2.2.
    """
    global _placed
    if _current_core is None:
        return
    core, allowed = _current_core(), os.sched_getaffinity(0)
    where = (core, allowed, len(threads))
    if where == _placed or core not in allowed or len(allowed) <= len(threads):
        return
    _placed = where
    for thread in list(threads):
        if thread.native_id is not None:
            with contextlib.suppress(OSError):  # forbidden here: then the scheduler decides
                os.sched_setaffinity(thread.native_id, allowed - {core})


def _find_current_core() -> Any:
    """The C library's sched_getcpu; None where there is none."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


_current_core = _find_current_core()


def run(n: int, worker: Any, arguments: int, size: int) -> None:
    """Call worker(arguments, scratch of `size` bytes) in up to n threads; returns when all tasks are done."""
    if n <= 1:
        worker(arguments, scratch(size))
        return
    queue, threads = _state
    if len(threads) < n - 1:
        with _grow:
            while len(threads) < n - 1:
                thread = threading.Thread(target=_serve, args=(queue,), daemon=True, name="pullback")
                thread.start()
                threads.append(thread)
    _keep_apart(threads)
    job = _Job(worker, arguments, size)
    for _ in range(n - 1):
        queue.put(job)
    try:
        worker(arguments, scratch(size))
    finally:
        job.close()

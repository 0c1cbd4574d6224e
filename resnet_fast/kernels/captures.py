"""CUDA graph captures: which capture a stream is in, and when the captured graph is destroyed.

PyTorch reports neither, so this module calls libcuda. `watch` attaches a user object to the graph.
The driver destroys that object once the graph, its copies and their executables are destroyed and
none of them is running. Its destructor is libc's `sem_post`: the driver calls it in a separate
thread, where CUDA calls are forbidden and Python code would wait for the GIL.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any, NamedTuple

ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
NO_DESTRUCTOR_SYNC = 1  # CU_USER_OBJECT_NO_DESTRUCTOR_SYNC, which the driver demands
MOVE = 1  # CU_GRAPH_USER_OBJECT_MOVE: the graph takes the caller's reference
SEMAPHORE_BYTES = 64  # a sem_t has 32 on 64-bit Linux


class Capture(NamedTuple):
    """An active capture: its id, unique in this process, and the graph that it captures into."""

    id: int
    graph: int


class Driver(NamedTuple):
    """The functions of libcuda and libc that this module calls, with declared argument types."""

    capture_info: Any
    create: Any
    retain: Any
    release: Any
    calloc: Any
    sem_init: Any
    sem_trywait: Any
    sem_post: Any


@functools.cache
def driver() -> Driver | None:
    """Functions of the driver that PyTorch loaded; None if the system lacks one of them."""
    try:
        return declared(ctypes.CDLL("libcuda.so.1"), ctypes.CDLL(None))
    except (OSError, AttributeError):
        return None


def declared(cuda: Any, libc: Any) -> Driver:
    """The functions of both libraries. Raises AttributeError if one is missing."""
    found = Driver(
        # no dependencies are requested, so _v2 (CUDA 11.3) reports as much as _v3
        cuda.cuStreamGetCaptureInfo_v2, cuda.cuUserObjectCreate, cuda.cuGraphRetainUserObject,
        cuda.cuUserObjectRelease, libc.calloc, libc.sem_init, libc.sem_trywait, libc.sem_post,
    )  # fmt: skip
    found.capture_info.argtypes = [
        c_void_p, POINTER(c_int), POINTER(c_ulonglong), POINTER(c_void_p), c_void_p, c_void_p,
    ]  # fmt: skip
    found.create.argtypes = [POINTER(c_void_p), c_void_p, c_void_p, c_uint, c_uint]
    found.retain.argtypes = [c_void_p, c_void_p, c_uint, c_uint]
    found.release.argtypes = [c_void_p, c_uint]
    found.calloc.argtypes, found.calloc.restype = [c_size_t, c_size_t], c_void_p
    found.sem_init.argtypes = [c_void_p, c_int, c_uint]
    found.sem_trywait.argtypes = [c_void_p]
    return found


def current(stream: int) -> Capture | None:
    """The capture that the CUDA stream is in; None without one or if the driver cannot tell."""
    calls = driver()
    if calls is None:
        return None
    status, number, graph = c_int(), c_ulonglong(), c_void_p()
    error = calls.capture_info(stream, byref(status), byref(number), byref(graph), None, None)
    if error or status.value != ACTIVE or not graph.value:
        return None
    return Capture(number.value, graph.value)


def watch(capture: Capture) -> int | None:
    """A semaphore that the driver posts when the captured graph can no longer run; None on failure.

    It is never freed: the driver may post it at any time, until the process ends.
    """
    calls = driver()
    semaphore = calls.calloc(1, SEMAPHORE_BYTES)
    if not semaphore or calls.sem_init(semaphore, 0, 0):
        return None
    made = c_void_p()
    destructor = ctypes.cast(calls.sem_post, c_void_p)
    if calls.create(byref(made), semaphore, destructor, 1, NO_DESTRUCTOR_SYNC):
        return None
    if calls.retain(capture.graph, made, 1, MOVE):
        calls.release(made, 1)
        return None
    return semaphore


def ended(semaphore: int) -> bool:
    """Whether the driver has posted a `watch` semaphore; True only once."""
    return driver().sem_trywait(semaphore) == 0

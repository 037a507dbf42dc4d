"""File permissions that hold for the tests too where root runs them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import pytest

VERSION_3 = 0x20080522  # _LINUX_CAPABILITY_VERSION_3 of linux/capability.h: two words of 32 bits in each set
OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: root reads and writes everything by these


@contextlib.contextmanager
def permissions_hold() -> Iterator[None]:
    """In the block, the permissions of files hold for this thread (and threads that it starts), also if it is root's.

    The user stays the same, so everything that belongs to them can still be read: the package, temporary folders.
    """
    if not hasattr(os, "geteuid"):
        pytest.skip("this system has no file permissions to take away")
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may read and write everywhere")
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)()

    def call(function: str, sets: ctypes.Array[ctypes.c_uint32]) -> None:
        if getattr(libc, function)(header, sets):
            raise OSError(ctypes.get_errno(), function)

    call("capget", before)
    without = type(before)(*before)
    without[0] &= ~OVERRIDES  # the effective set; the permitted one stays, so that `before` can be set again
    call("capset", without)
    try:
        yield
    finally:
        call("capset", before)

"""Memory of a process that trains networks: what a step of learning frees, the next one gets again.

glibc gives freed memory back to the kernel as soon as there are a few hundred kilobytes of it at a thread's end of
the heap; every step of a small network would then fetch its activations anew, page by page and zeroed.
Source: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

KEPT_BYTES = 64 << 20
"""So much freed memory a thread's heap keeps."""
APART_BYTES = 32 << 20
"""Larger arrays are mapped on their own, and unmapped when they are freed: the most that glibc takes."""
_TRIM, _MMAP = -1, -3


def keep_freed() -> None:
    """Make glibc keep it; elsewhere nothing is done."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(_TRIM, KEPT_BYTES)
            libc.mallopt(_MMAP, APART_BYTES)

"""Huge pages for a bank, on request: rows far apart cost one page walk each, and 2 MB pages make walks short."""

from __future__ import annotations

import ctypes
import os
import sys

from torch import Tensor

HUGE_PAGE_BYTES = 2 * 1024 * 1024
# linux/mman.h
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25


def request_huge_pages(tensor: Tensor) -> str | None:
    """Ask Linux to hold a contiguous CPU tensor's memory in 2 MB pages, now; returns None, or why it did not.

    Contents stay as they are. Takes about the time of copying the tensor once. What lies outside whole 2 MB pages
    keeps small ones.
    """
    if sys.platform != "linux":
        return "only Linux is supported"
    if not tensor.is_cpu or not tensor.is_contiguous():
        return f"the tensor must be contiguous on the CPU, got {tensor.device} with strides {tuple(tensor.stride())}"
    first = -(-tensor.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    size = (tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if size <= 0:
        return f"{tensor.nbytes} bytes hold no whole page of {HUGE_PAGE_BYTES}"
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # The first for pages that are not there yet, the second (Linux 6.1) for those that are.
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        if madvise(first, size, advice):
            return f"madvise({advice}): {os.strerror(ctypes.get_errno())}"
    return None

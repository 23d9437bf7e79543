"""Keeping the memory of one step for the next."""

import ctypes

# mallopt's parameters (malloc.h) and the largest value it takes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST = -1, -3, 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc's malloc hold on to freed memory instead of returning it to the system; whether it could.

    A training step allocates and frees the same gigabytes of activations again and again. By default large
    blocks go back to the system at once, and every page of the next step's is zeroed and mapped anew, which
    costs more than some operators compute. The process keeps its peak instead. No effect on GPUs' memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    done = [mallopt(_M_MMAP_THRESHOLD, _LARGEST), mallopt(_M_TRIM_THRESHOLD, _LARGEST)]
    return all(done)

"""The machine that trains: which device, how the C library keeps memory, and the signals that stop it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kdedge.errors import KdedgeError


def chosen_device(name: str) -> torch.device:
    """The device of that name; auto is the GPU if there is one. Raises KdedgeError when there is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise KdedgeError(
                "--device cuda: torch finds no usable GPU here. Use --device cpu, or auto to take what there is."
            )
        # Resuming promises the same bytes; cuBLAS keeps it only with a fixed workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device(name)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bfloat16: a GPU that does not emulate it, an x86 with AVX512-BF16. There
    a step takes 0.5 to 0.9 of its time in float32 (docs/lab-notes.md)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory. By default it returns every large tensor to the system at once, and each step
    pays for its pages anew: 768 against 1,186 images/s for the TCN teacher on 2 cores (docs/lab-notes.md)."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # the numbers of mallopt(3)
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)
    libc.mallopt(top_pad, 1 << 26)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C and SIGTERM only raise a flag, so that a stage can save itself between two steps. A
    second Ctrl-C stops at once. Elsewhere than in the main thread signals are left alone."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(signum: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What is asked of the machine that trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdedge.machine import multiplies_bf16

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.is_file(), reason="the system does not say what its CPU can")
def test_a_cpu_multiplies_bf16_when_linux_says_so() -> None:
    assert multiplies_bf16(torch.device("cpu")) == ("avx512_bf16" in CPUINFO.read_text(encoding="utf-8"))

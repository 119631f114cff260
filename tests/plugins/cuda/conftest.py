"""Where the plugin's Triton kernels run without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import triton_interpreted


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process that interprets Triton kernels on CPU tensors."""
    pytest.importorskip("triton")
    with triton_interpreted.interpreter() as pool:
        yield pool

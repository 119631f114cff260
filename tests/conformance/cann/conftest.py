"""The simulated CANN's own C code, compiled without torch-npu."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from grpo_conformance.cann.build import runtime


@pytest.fixture(scope="session")
def cann_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runtime(tmp_path_factory.mktemp("cann"))


@pytest.fixture(scope="session")
def cann(cann_library: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(cann_library))
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    library.grpo_cann_recorded.restype = ctypes.c_char_p
    library.aclCreateTensor.restype = ctypes.c_void_p
    library.aclCreateTensorList.restype = library.aclCreateScalar.restype = ctypes.c_void_p
    library.aclCreateIntArray.restype = ctypes.c_void_p
    return library

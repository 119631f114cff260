"""One pip of a known release for all tests that ask it what it would install."""

from __future__ import annotations

from pathlib import Path

import pytest
from dry_run import install_pip


@pytest.fixture(scope="session")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `dry_run.install_pip`."""
    return install_pip(tmp_path_factory.mktemp("pip"))

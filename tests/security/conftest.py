from __future__ import annotations

from pathlib import Path

import pytest

from tests.security.crafted import publish_real


@pytest.fixture(scope="package")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real artifact; who changes it works on a copy."""
    return publish_real(tmp_path_factory.mktemp("real"))

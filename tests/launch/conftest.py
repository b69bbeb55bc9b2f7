"""Stand-ins for the programs that scripts of launch/ call."""

import pytest

from tests.launch.stubs import Stubs


@pytest.fixture
def stubs(tmp_path):
    """Programs that write down their calls."""
    return Stubs(tmp_path / "stubs")

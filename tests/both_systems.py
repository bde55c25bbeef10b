"""A mark for tests of generation that hold for one and for several codes a position."""

import pytest

BOTH_SYSTEMS = pytest.mark.parametrize(
    "num_codebooks", [None, 4], indirect=True, ids=["one_code", "several_codes"]
)

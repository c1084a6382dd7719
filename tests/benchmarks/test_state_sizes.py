"""README's table of what optimizers keep is what they keep."""

import re
from pathlib import Path

import pytest

from bench.suites import state_sizes

README = Path(__file__).parents[2] / "README.md"


def test_readme_has_the_measured_sizes():
    written = [line for line in README.read_text().splitlines() if line.startswith("|")]
    squeezed = {re.sub(r"\s+", "", line) for line in written}
    missing = [line for line in state_sizes.lines()[2:] if re.sub(r"\s+", "", line) not in squeezed]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize(
    ("row", "bytes_each"),
    [(0, 8), (1, 12), (2, 4 + 4), (3, 2 + 8 / 128 + 4), (4, 14), (5, 4 + 4 + 2), (6, 2 + 8 / 128 + 4 + 2)],
)
def test_state_takes_what_its_arrays_take(row, bytes_each):
    """Moments, slow weights in fp32, and the low half of a master; scales of 4 bytes for 128 codes."""
    kept = state_sizes.bytes_per_parameter(state_sizes.ROWS[row])
    assert bytes_each <= kept < bytes_each + 1e-3

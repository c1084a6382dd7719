"""Which backends the tests of every backend were run on."""

from __future__ import annotations

import pytest
from helpers import BackendCase


def test_the_suite_runs_on(any_backend: BackendCase, reason_against: str) -> None:
    """One skip, with the reason, stands for the thousands of a backend that does not serve here."""
    if reason_against:
        pytest.skip(f"the tests of every backend leave {any_backend.name} out: {reason_against}")

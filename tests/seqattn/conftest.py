"""Fixtures of the library's tests."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def as_users_call_it() -> Iterator[None]:
    """Without the check of annotations, which only tests have: a wrong argument meets the library's own error."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

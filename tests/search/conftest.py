"""The small model and the rows of the compression's tests."""

from tests.compression.conftest import small_base, sums

__all__ = ["small_base", "sums"]

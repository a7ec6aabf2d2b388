"""The runs that the end-to-end tests make, for hostile changes of them."""

from tests.end_to_end.conftest import tiny_data, undisturbed

__all__ = ["tiny_data", "undisturbed"]

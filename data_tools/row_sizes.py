"""Sizes that the rows of an Arrow array have as Python values, which may be much larger than the array itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow

_ELEMENT_BYTES = 8
"""The bytes that an element of a list counts in addition to its text, because lists of absent values take memory, too."""


type Known = dict[tuple[int, ...], tuple[NDArray[np.int64], pyarrow.Array]]
"""Sizes of arrays that several slices of one batch share, by the addresses of their buffers, with the arrays: while an array is kept,
no other can get its addresses."""


def text_sizes(array: pyarrow.Array, known: Known | None = None) -> NDArray[np.int64]:
    """Return the bytes of the text in each row. A text that a row refers to several times, such as a dictionary entry, counts each time.

    Args:
        known: arrays that several slices of a batch share are measured once for all calls that get the same dictionary.

    Returns:
        int64 [rows].
    """
    import pyarrow
    from pyarrow import compute, types

    kind, known = array.type, {} if known is None else known
    if not len(array):
        return np.zeros(0, dtype=np.int64)
    if isinstance(array, pyarrow.ExtensionArray):
        return text_sizes(array.storage, known)
    if types.is_dictionary(kind):
        return _taken(_shared_sizes(array.dictionary, known), array.indices)
    if types.is_run_end_encoded(kind):
        places = np.arange(array.offset, array.offset + len(array))
        return _shared_sizes(array.values, known)[np.searchsorted(array.run_ends.to_numpy(), places, side="right")]
    if any(is_kind(kind) for is_kind in (types.is_binary, types.is_string, types.is_large_binary, types.is_large_string)):
        return _numbers(compute.binary_length(array))
    if types.is_binary_view(kind) or types.is_string_view(kind):
        return _view_lengths(array)
    if types.is_fixed_size_binary(kind):
        return np.full(len(array), kind.byte_width, dtype=np.int64)
    if types.is_struct(kind):
        return sum((text_sizes(child, known) for child in array.flatten()), np.zeros(len(array), dtype=np.int64))
    if types.is_union(kind):
        return sum((_union_child(array, i, known) for i in range(kind.num_fields)), np.zeros(len(array), dtype=np.int64))
    if types.is_nested(kind):
        return _list_sizes(array, known)
    return np.zeros(len(array), dtype=np.int64)


def _shared_sizes(array: pyarrow.Array, known: Known) -> NDArray[np.int64]:
    """Measure an array that every slice of a batch refers to as a whole."""
    key = (len(array), array.offset, *(buffer.address if buffer is not None else 0 for buffer in array.buffers()))
    if key not in known:
        known[key] = text_sizes(array, known), array
    return known[key][0]


def _numbers(array: pyarrow.Array) -> NDArray[np.int64]:
    numbers: NDArray[np.int64] = array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers


def _taken(sizes: NDArray[np.int64], indices: pyarrow.Array) -> NDArray[np.int64]:
    return np.append(sizes, 0)[np.where(indices.is_valid(), _numbers(indices), len(sizes))]


def _view_lengths(array: pyarrow.Array) -> NDArray[np.int64]:
    """Return the length in bytes of each value of an Arrow array of type string_view or binary_view. A view has 16 bytes, and its first
    four bytes are the length."""
    views = np.frombuffer(array.buffers()[1], dtype=np.int32).reshape(-1, 4)[array.offset : array.offset + len(array), 0]
    return np.where(array.is_valid(), views, 0).astype(np.int64)


def _union_child(array: pyarrow.Array, number: int, known: Known) -> NDArray[np.int64]:
    """Return the size of the child's largest row for every row, since the rows of this child are not determined."""
    child = array.field(number)
    return np.full(len(array), _shared_sizes(child, known).max(initial=0))


def _list_sizes(array: pyarrow.Array, known: Known) -> NDArray[np.int64]:
    from pyarrow import types

    if types.is_fixed_size_list(array.type):
        width = array.type.list_size
        starts = (array.offset + np.arange(len(array))) * width
        stops = starts + width
    elif types.is_list(array.type) or types.is_large_list(array.type) or types.is_map(array.type):
        offsets = array.offsets.to_numpy().astype(np.int64)
        starts, stops = offsets[:-1], offsets[1:]
    else:  # a list view
        starts = array.offsets.to_numpy().astype(np.int64)
        stops = starts + array.sizes.to_numpy()
    first, last = int(starts.min()), int(stops.max())
    values = _elements(array).slice(first, last - first)
    ends = np.concatenate([[0], np.cumsum(text_sizes(values, known) + _ELEMENT_BYTES)])
    return np.where(array.is_valid(), ends[stops - first] - ends[starts - first], 0)


def _elements(array: pyarrow.Array) -> pyarrow.Array:
    """Return the elements of the lists; those of a map are pairs of a key and a value."""
    import pyarrow
    from pyarrow import types

    if not types.is_map(array.type):
        return array.values
    return pyarrow.StructArray.from_arrays([array.keys, array.items], names=["key", "value"])

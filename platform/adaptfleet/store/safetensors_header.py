"""Reads a safetensors file's header with the standard library alone, and checks that the file is whole.

Format: https://github.com/huggingface/safetensors#format: eight bytes, little-endian, the header's length N; N bytes of JSON; the tensors.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

_MAX_HEADER_BYTES = 100_000_000
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorEntry:
    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> Mapping[str, TensorEntry]:
    """The tensors by name. ValueError with the fact where the file is truncated or no safetensors file."""
    num_bytes = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"it has {num_bytes} bytes, too few for a safetensors header")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"it is no safetensors file: its header would have {header_bytes} bytes")
        raw = stream.read(header_bytes)
    if len(raw) < header_bytes:
        raise ValueError(f"it is truncated: the header has {header_bytes} bytes, the whole file {num_bytes}")
    try:
        header = json.loads(raw)
        tensors, end = _entries(header)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is no safetensors header: {error}") from None
    expected = 8 + header_bytes + end
    if num_bytes != expected:
        state = "truncated" if num_bytes < expected else "longer than its tensors"
        raise ValueError(f"it is {state}: it has {num_bytes} bytes, its header promises {expected}")
    return tensors


def _entries(header: dict[str, dict]) -> tuple[dict[str, TensorEntry], int]:
    """The tensors, and where the last one ends. ValueError where bytes and shape differ, or tensors overlap or leave gaps."""
    tensors: dict[str, TensorEntry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
            raise ValueError(f"{name} has the shape {list(shape)} at {begin} to {end}")
        if dtype not in _BITS:
            raise ValueError(f"{name} has the unknown type {dtype!r}")
        if (end - begin) * 8 != prod(shape) * _BITS[dtype]:
            raise ValueError(f"{name} of {dtype}{list(shape)} has {end - begin} bytes")
        tensors[name] = TensorEntry(dtype, shape)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"{name} begins at {begin}, but the tensor before it ends at {position}")
        position = end
    return tensors, position

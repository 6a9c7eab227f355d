"""Rows of a SQLite file that SQLite itself no longer reads, by the file's documented format.

https://www.sqlite.org/fileformat2.html: a table's rows are cells of its leaf pages, each a record that says the types
of its own values. A leaf page needs nothing but itself to be read, so whatever pages are whole give up their rows.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["SQLiteValue", "leaf_rows", "read_pages"]

SQLiteValue = int | float | str | bytes | None

_MAGIC = b"SQLite format 3\x00"
_PAGE_SIZES = [1 << power for power in range(9, 17)]
_USUAL_PAGE_BYTES = 4096
_FILE_HEADER_BYTES = 100
_WAL_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_LEAF = 0x0D
_LEAF_HEADER_BYTES = 8
_LONGEST_VALUE = 1 << 20  # bytes; no column of ours holds more
_MOST_COLUMNS = 64
_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


def read_pages(path: Path, log: Path) -> dict[int, bytes]:
    """Page number, from 1, → content: of the file, and over it what its write-ahead log has committed, where there is
    one. Free pages are left out as far as their list can be read. Raises OSError.
    """
    content = path.read_bytes()
    size = _page_bytes(content)
    pages = {start // size + 1: content[start : start + size] for start in range(0, len(content), size)}
    if log.exists():
        pages.update(_committed(log.read_bytes(), size))
    for number in _free(pages, size):
        pages.pop(number, None)
    return pages


def leaf_rows(pages: Mapping[int, bytes]) -> Iterator[tuple[SQLiteValue, ...]]:
    """Every record of every leaf page of a table that can be decoded, whichever table it is of."""
    size = max(map(len, pages.values()), default=0)
    for number in sorted(pages):
        page, start = pages[number], _FILE_HEADER_BYTES if number == 1 else 0
        if len(page) < start + _LEAF_HEADER_BYTES or page[start] != _LEAF:
            continue
        for cell in range(int.from_bytes(page[start + 3 : start + 5], "big")):
            pointer = start + _LEAF_HEADER_BYTES + 2 * cell
            try:
                payload = _payload(pages, page, int.from_bytes(page[pointer : pointer + 2], "big"), size)
                yield _record(payload)
            except (IndexError, ValueError, KeyError, struct.error):
                continue  # a damaged cell; those beside it may be whole


def _page_bytes(content: bytes) -> int:
    stated = int.from_bytes(content[16:18], "big")
    stated = 65536 if stated == 1 else stated
    return stated if content.startswith(_MAGIC) and stated in _PAGE_SIZES else _USUAL_PAGE_BYTES


def _committed(log: bytes, size: int) -> dict[int, bytes]:
    """The pages in a log up to its last commit; frames of an earlier round have other salts."""
    salts = log[16:24]
    pages: dict[int, bytes] = {}
    pending: dict[int, bytes] = {}
    for start in range(_WAL_HEADER_BYTES, len(log) - _FRAME_HEADER_BYTES - size + 1, _FRAME_HEADER_BYTES + size):
        number, pages_after_commit = struct.unpack_from(">II", log, start)
        if log[start + 8 : start + 16] != salts:
            break
        pending[number] = log[start + _FRAME_HEADER_BYTES : start + _FRAME_HEADER_BYTES + size]
        if pages_after_commit:
            pages.update(pending)
            pending.clear()
    return pages


def _free(pages: Mapping[int, bytes], size: int) -> set[int]:
    """The numbers of the pages on the list of free ones: what was deleted must not come back."""
    free: set[int] = set()
    trunk = int.from_bytes(pages.get(1, b"")[32:36], "big")
    while trunk in pages and trunk not in free and len(pages[trunk]) == size:
        free.add(trunk)
        following, count = struct.unpack_from(">II", pages[trunk])
        leaves = min(count, size // 4 - 2)
        free.update(struct.unpack_from(f">{leaves}I", pages[trunk], 8))
        trunk = following
    return free


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for count in range(8):
        byte = data[at + count]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + count + 1
    return value << 8 | data[at + 8], at + 9


def _payload(pages: Mapping[int, bytes], page: bytes, at: int, size: int) -> bytes:
    length, at = _varint(page, at)
    _, at = _varint(page, at)
    if not 0 < length <= _LONGEST_VALUE:
        raise ValueError("no length of a record")
    most, least = size - 35, (size - 12) * 32 // 255 - 23
    local = length
    if length > most:
        fits = least + (length - least) % (size - 4)
        local = fits if fits <= most else least
    payload = page[at : at + local]
    following = int.from_bytes(page[at + local : at + local + 4], "big") if local < length else 0
    while len(payload) < length:
        overflow = pages[following]
        following = int.from_bytes(overflow[:4], "big")
        payload += overflow[4 : 4 + length - len(payload)]
    return payload


def _record(payload: bytes) -> tuple[SQLiteValue, ...]:
    end, at = _varint(payload, 0)
    types = []
    while at < end:
        kind, at = _varint(payload, at)
        types.append(kind)
    if at != end or not 0 < len(types) <= _MOST_COLUMNS:
        raise ValueError("no header of a record")
    values = []
    for kind in types:
        value, at = _value(payload, at, kind)
        values.append(value)
    if at != len(payload):
        raise ValueError("no body of a record")
    return tuple(values)


def _value(payload: bytes, at: int, kind: int) -> tuple[SQLiteValue, int]:
    if kind in (0, 8, 9):
        return (None, 0, 1)[(0, 8, 9).index(kind)], at
    if kind == 7:
        return float(struct.unpack_from(">d", payload, at)[0]), at + 8
    length = _INTEGER_BYTES.get(kind) or (kind - 12) // 2
    if length < 0 or kind in (10, 11) or at + length > len(payload):
        raise ValueError("no type of a value")
    data = payload[at : at + length]
    if kind in _INTEGER_BYTES:
        return int.from_bytes(data, "big", signed=True), at + length
    return (data.decode() if kind % 2 else data), at + length

"""Arrays as byte planes: all lowest bytes, then all second bytes, …, each compressed by itself.

Bytes of one significance have one distribution, and zstd's entropy coder knows one distribution at a time. A
``Packer`` writes planes one after the other, an ``Unpacker`` reads them back; what each plane holds, and how many
bytes, is known to both from what came before it. FORMAT.md, "Blocks", has the bytes.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from logit_store.codec.kernels import fastest
from logit_store.errors import CorruptError, StoreError

MAX_PLANES = 64
ZSTD_LEVEL = 1
"""Planes have no repeats to find, only a distribution: higher levels cost time and gain less than 1 %."""

MAX_EXPANSION = 128
FREE_BYTES = 8 * 2**20
"""The arrays of a block may take ``max(FREE_BYTES, MAX_EXPANSION × its size)`` bytes, no more: a small file cannot ask
for large memory. Those of real labels take 10 times its size; zeros beyond the limit are stored uncompressed."""

ARRAYS_PER_PLANE = 8
"""What decoding allocates per byte of the planes, at most: of two planes of a dense head come codes, ids, log-probs."""

_ZEROS = np.zeros(0, np.uint8)
_local = threading.local()


class Packer:
    """Collects planes; ``bytes()`` is the block."""

    def __init__(self, compress: bool = True) -> None:
        self.planes: list[bytes] = []
        self.raw_bytes = 0
        self._compress = compress

    def add(self, values: NDArray[Any], num_planes: int) -> None:
        """Add the lowest ``num_planes`` bytes of each value, lowest byte first."""
        self.raw_bytes += num_planes * values.size
        if self._compress and not values.any():
            self.planes += [b""] * num_planes
            return
        little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        bytes_of = little.view(np.uint8).reshape(-1, little.itemsize)
        for i in range(num_planes):
            self.planes.append(self._plane(np.ascontiguousarray(bytes_of[:, i])))

    def _plane(self, raw: NDArray[np.uint8]) -> bytes:
        if not self._compress:
            return raw.tobytes()
        if not raw.any():
            return b""
        if not hasattr(_local, "compressor"):
            _local.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        packed: bytes = _local.compressor.compress(raw)
        return packed if len(packed) < len(raw) else raw.tobytes()

    def bytes(self) -> bytes:
        """The block: a bit for each plane that is not all zeros, the sizes of those planes, the planes."""
        mask = sum(1 << i for i, plane in enumerate(self.planes) if plane)
        sizes = np.array([len(plane) for plane in self.planes if plane], "<u4")
        return b"".join([mask.to_bytes(8, "little"), sizes.tobytes(), *self.planes])


class Unpacker:
    """Reads the planes of a block (bytes or an array of them) in order. Raises CorruptError where it is none."""

    def __init__(self, block: Any, name: str, num_planes: int = MAX_PLANES) -> None:
        self.name = name
        self._block = memoryview(block)
        self._budget = max(FREE_BYTES, MAX_EXPANSION * len(block))
        mask = int.from_bytes(self._block[:8], "little")
        places = [i for i in range(MAX_PLANES) if mask >> i & 1]
        if places and places[-1] >= num_planes:
            raise self.error("it has planes of nothing")
        self._at = 8 + 4 * len(places)
        if len(block) < self._at:
            raise self.error("it ends within its header")
        sizes = np.frombuffer(self._block[8 : self._at], "<u4").tolist()
        if self._at + sum(sizes) != len(block):
            raise self.error("its planes do not fill it")
        self._sizes = dict(zip(places, sizes, strict=True))
        self._next = 0

    def error(self, reason: str) -> CorruptError:
        """What is wrong with this block, and where it is."""
        return CorruptError(f"{self.name} is damaged: {reason}. Restore it from a copy, or make the shard again")

    def charge(self, num_bytes: int) -> None:
        """Count an array that is about to be allocated. Raises CorruptError where the block asks for too much."""
        self._budget -= num_bytes
        if self._budget < 0:
            raise self.error(f"it asks for more memory than {MAX_EXPANSION} times its size")

    def skip(self, num_planes: int) -> None:
        """Pass over planes that nobody wants."""
        for _ in range(num_planes):
            self._at += self._sizes.get(self._next, 0)
            self._next += 1

    def sizes(self, num_planes: int) -> int:
        """Stored bytes of the next planes, which are passed over."""
        before = self._at
        self.skip(num_planes)
        return self._at - before

    def take(self, num_values: int, num_planes: int, dtype: Any) -> NDArray[Any]:
        """The next array: ``num_values`` of ``dtype``, of which ``num_planes`` bytes are stored."""
        dtype = np.dtype(dtype)
        if not num_values:
            self.skip(num_planes)
            return np.zeros(0, dtype)
        self.charge(num_values * dtype.itemsize)
        planes = [self._take_plane(num_values) for _ in range(num_planes)]
        if dtype.itemsize == 1:
            return planes[0] if len(planes[0]) else np.zeros(num_values, dtype)
        values: NDArray[Any] = np.empty(num_values, np.uint16 if dtype.itemsize == 2 else np.uint32)
        fastest().join_planes(*planes, *[_ZEROS] * (4 - num_planes), values)
        return values.view(dtype)

    def _take_plane(self, num_bytes: int) -> NDArray[np.uint8]:
        """A plane's bytes; none for a plane of zeros."""
        size = self._sizes.get(self._next, 0)
        self._next += 1
        stored = self._block[self._at : self._at + size]
        self._at += size
        if size == 0:
            return _ZEROS
        if size == num_bytes:
            return np.frombuffer(stored, np.uint8)
        if not hasattr(_local, "decompressor"):
            _local.decompressor = zstandard.ZstdDecompressor()
        try:
            if zstandard.frame_content_size(stored) != num_bytes:  # before anything of that size is allocated
                raise self.error("a plane does not hold what the planes before it say")
            raw = _local.decompressor.decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self.error(f"a plane cannot be decompressed ({error})") from None
        return np.frombuffer(raw, np.uint8)


def pack(fill: Callable[[Packer], None]) -> bytes:
    """A block from ``fill(packer)``, within the limit on what it may unpack to.

    Raises StoreError where a block is too large for any.
    """
    packer = Packer()
    fill(packer)
    block = packer.bytes()
    if ARRAYS_PER_PLANE * packer.raw_bytes > max(FREE_BYTES, MAX_EXPANSION * len(block)):
        packer = Packer(compress=False)
        fill(packer)
        block = packer.bytes()
    if len(block) >= 2**32:
        raise StoreError(
            f"a block of {len(block):,} bytes: one row's labels must stay below 4 GiB. Use shorter windows"
        )
    return block

"""Arrow IPC files of one record batch, read without trust: nothing is decompressed, nothing is copied."""

import io
import struct

import pyarrow as pa

IPC_ERRORS = (pa.ArrowException, OSError, EOFError, struct.error)
"""What reading a file that is not such a file may raise."""


def write_batch(batch: pa.RecordBatch) -> bytes:
    """The bytes of an Arrow IPC file with this one batch, uncompressed so that it can be mapped."""
    sink = io.BytesIO()  # whose bytes are given away without a copy: an index may have gigabytes
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def read_batch(data: pa.Buffer) -> pa.RecordBatch:
    """The record batch of a file, zero-copy; ``validate(full=True)`` it before use. Raises one of ``IPC_ERRORS``.

    Refuses one that Arrow would decompress: nobody knows to what size.
    """
    reader = pa.BufferReader(data.slice(8))  # after the magic bytes of a file comes what a stream holds
    schema = pa.ipc.read_schema(pa.ipc.read_message(reader))
    message = pa.ipc.read_message(reader)
    if _is_compressed(message.metadata.to_pybytes()):
        raise pa.ArrowInvalid("its record batch is compressed by Arrow")
    return pa.ipc.read_record_batch(message, schema)


def _is_compressed(metadata: bytes) -> bool:
    """Whether a record batch message (flatbuffers, Arrow's Message.fbs) has a `compression` field."""

    def field(table: int, number: int) -> int:
        """Where a table's field is, 0 where it is absent: tables point back to a list of their fields' offsets."""
        fields = table - struct.unpack_from("<i", metadata, table)[0]
        size = struct.unpack_from("<H", metadata, fields)[0]
        offset = struct.unpack_from("<H", metadata, fields + 4 + 2 * number)[0] if size > 4 + 2 * number else 0
        return table + offset if offset else 0

    message = struct.unpack_from("<I", metadata, 0)[0]
    header = field(message, 2)
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return field(batch, 3) != 0

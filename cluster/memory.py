"""How errors say that memory ran out."""

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "out of memory",
    "ALLOC_FAILED",
)
"""What a RuntimeError says where memory ran out: of torch's CPU allocators, C++, the CUDA driver, cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory, of a GPU or the machine, ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OUT_OF_MEMORY)

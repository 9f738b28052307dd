"""From stores to micro-batches of tensors, read ahead of the student."""

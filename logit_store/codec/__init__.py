"""Labels to bytes and back: blocks of rows, ids as floating-point numbers, log-probs as levels, byte planes."""

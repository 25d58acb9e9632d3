"""The number format float8: 8-bit floating point with float32 scales."""

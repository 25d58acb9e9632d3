"""The number format mxfp8: float8 values in blocks of 32 that share a power of two."""

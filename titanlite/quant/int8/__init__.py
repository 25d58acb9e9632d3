"""The number format int8: one scale for each row or column that a matmul sums over."""

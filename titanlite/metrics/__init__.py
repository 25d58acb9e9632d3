"""Measurements of a run, and their outputs: FLOPs and MFU, memory, the console, metrics.jsonl and TensorBoard."""

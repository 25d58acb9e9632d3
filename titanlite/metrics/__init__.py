"""What a run tells: FLOPs and MFU, memory, the console, metrics.jsonl and TensorBoard."""

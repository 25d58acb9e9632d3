"""Saved state: folders of safetensors as ``transformers`` reads and writes them."""

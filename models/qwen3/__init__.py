"""Alibaba's dense Qwen3."""

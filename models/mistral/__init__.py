"""Mistral AI's dense models."""

"""Use of a trained model: load it, generate text, convert it."""

"""Meta's Llama 3 family."""

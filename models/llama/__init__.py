"""Meta's Llama family, and what others publish in its form."""

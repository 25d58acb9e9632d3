"""Model families: one package each, found by its name and registered by its ``spec`` module."""

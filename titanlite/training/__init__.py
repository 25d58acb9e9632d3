"""The components of one run: the built model, its start, validation, the run folder, guards against bad steps."""

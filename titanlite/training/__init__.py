"""What one run is made of: the built model, where it begins, validation, its folder, guards against bad steps."""

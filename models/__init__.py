"""Model families. Each is a package ``titanlite.models.<name>``, whose module ``spec`` registers it."""

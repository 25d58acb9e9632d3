"""Model families, a package each: ``titanlite.models.<name>``, which its module ``spec`` registers."""

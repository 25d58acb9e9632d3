"""Number formats, and the layers that compute in them. Imports torch and triton, and nothing else of titanlite."""

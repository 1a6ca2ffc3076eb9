"""Which route a step takes."""

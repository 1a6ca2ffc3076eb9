"""A way to attend over pages, each."""

"""Tiny models of today's families, what they are asked, and how two answers compare."""

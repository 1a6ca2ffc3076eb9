"""Pages, and who holds them."""

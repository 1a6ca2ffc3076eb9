"""All that only measures."""

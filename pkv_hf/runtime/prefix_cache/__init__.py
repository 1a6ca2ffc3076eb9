"""Prompts that begin as earlier ones did: pages of past prompts kept by content, for calls to come."""

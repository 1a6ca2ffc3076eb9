"""Every model type of transformers, tiny: which of them `patch` serves, and whether rightly."""

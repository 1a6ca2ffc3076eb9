"""The run-ahead loop of generate(), and what it has to know of a model."""

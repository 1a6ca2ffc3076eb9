"""One call of a patched model, from the gate to the graph."""

"""Decode steps on buffers that stay where they are, their CUDA graphs, and what tells that a graph is void."""

"""What a model and its pages need of memory."""

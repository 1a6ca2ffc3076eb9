"""What is measured on: models, texts, requests."""

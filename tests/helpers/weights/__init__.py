"""Weights as libraries pack them."""

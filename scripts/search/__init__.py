"""Searching recorded spaces."""

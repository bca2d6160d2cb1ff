"""Backends: one file a runtime."""

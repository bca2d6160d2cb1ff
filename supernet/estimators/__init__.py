"""Estimators: how good is an architecture. One file each."""

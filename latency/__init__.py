"""Latency as a measured, additive cost of an architecture.

`sites` lists the operations of a live supernet, `measure` times the distinct ones on a target
through one of the `backends`, `table` holds the result, and `model` adds it up, differentiably.
All times are in milliseconds.
"""

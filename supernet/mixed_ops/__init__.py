"""Mixed operations: one file a relaxation."""

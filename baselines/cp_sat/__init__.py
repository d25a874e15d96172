"""Exact models, solved with CP-SAT (the optional dependency ortools: `pip install schedlab[exact]`)."""

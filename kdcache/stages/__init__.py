"""Whole jobs as functions that read top to bottom: precompute, distill, demo, doctor."""

"""Caches on disk: writing, publishing, opening, gathering, verifying, merging, exporting. NumPy, no torch."""

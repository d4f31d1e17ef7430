"""Prometheus metrics: one catalog of names, and their export from status snapshots.

Reads what VMs say about themselves; must not count anything itself.
"""

"""Faults of the kinds that real ports have had, and how many of them the suite notices."""

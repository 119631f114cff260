"""Whole plugins that are wrong in themselves, installed by an entry point like any other."""

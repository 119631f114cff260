"""The levels of the suite, one module each."""

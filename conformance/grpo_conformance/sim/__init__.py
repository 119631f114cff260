"""The simulated accelerator: a torch device of its own for tests, an ordinary plugin, never chosen by itself."""

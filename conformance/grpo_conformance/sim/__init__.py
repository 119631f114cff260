"""The simulated accelerator: a torch device of its own, an ordinary plugin, never chosen by itself."""

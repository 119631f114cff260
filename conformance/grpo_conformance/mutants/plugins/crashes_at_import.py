"""Fails before it has a hook."""

raise OSError("libvendor.so.3: cannot open shared object file")

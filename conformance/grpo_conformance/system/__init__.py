"""Level 5: real runs of tiny models, on the device and on the references of the CPU."""

"""Ray Train: workers, checkpoints, failures, the driver and the head node."""

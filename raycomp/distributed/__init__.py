"""Ray Train: workers, checkpoints, the driver. Imported for its modules, so that nothing needs Ray that does not use it."""

"""What a stage trains on: global batches that are the same on any number of workers."""

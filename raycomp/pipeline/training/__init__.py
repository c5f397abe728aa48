"""A stage's training on one worker: the loop, its metrics, its checkpoints."""

"""The training loop: updates, state, checkpoints, processes, validation."""

"""One training loop over tasks: optimizers, averaging, checkpoints, logs, and the recipes' configuration."""

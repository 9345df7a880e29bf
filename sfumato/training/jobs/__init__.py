"""From a recipe to what the trainer runs: nets, batches, and what is published."""

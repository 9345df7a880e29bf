"""Questions that take many runs to answer: a plan, its cells as runs of the trainer, and what they show."""

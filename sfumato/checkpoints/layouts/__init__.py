"""The layouts of published files, one table each."""

"""Tokenization, all on the `tokenizers` library."""

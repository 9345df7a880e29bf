"""Measuring systems: figures always come with the protocol that gave them."""

"""A captioned world whose pictures can be read back exactly: one to four colored shapes on a plain ground."""

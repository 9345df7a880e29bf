"""What is trained: each task yields the losses of its phases for one batch."""

"""Reading and writing weights: no pickle is executed, nothing half-written, every tensor checked."""

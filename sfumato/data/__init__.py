"""Pictures from disk: the folder reader, its rules and checks, transforms, and the OpenMoji set."""

"""A network in use: over images, over devices, and trained."""

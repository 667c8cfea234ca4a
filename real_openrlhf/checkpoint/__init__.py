"""Checkpoints on disk: complete or not there at all. Files only; what goes into them is the caller's."""

"""Checkpoints on disk: complete or not there at all. Only files are handled here; the caller decides what they hold."""

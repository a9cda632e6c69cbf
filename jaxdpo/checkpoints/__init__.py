"""Checkpoints and run folders: saving, restoring, and reading a finished run."""

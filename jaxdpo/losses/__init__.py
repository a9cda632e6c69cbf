"""Preference losses: the registry, the functions, and what they see of a batch."""

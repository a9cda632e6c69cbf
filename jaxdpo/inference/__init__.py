"""A model that answers: loading it, prompts, conversation."""

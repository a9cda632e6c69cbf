"""A model that answers prompts: loading, sampling, chat; no training."""

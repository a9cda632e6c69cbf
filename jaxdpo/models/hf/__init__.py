"""All that knows Hugging Face's files: config.json, weights, adapters, the hub, model cards."""

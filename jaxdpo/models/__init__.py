"""The decoder: config, layers, attention, LoRA, quantisation, decoding, log-probs."""

"""Preference rows to packed batches: reading, tokenizing, caching, packing."""

"""Weights, roles, masks, cache, tokenizer: everything that knows what a network is."""

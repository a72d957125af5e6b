"""Weights, roles, masks, cache, tokenizer: everything that has to know about the network itself."""

"""Decoders, their policies and sampling, and the loop that runs them. `state` holds the one mechanism they share."""

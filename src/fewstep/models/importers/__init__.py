"""Checkpoints of other families as plain folders: one file per family, one that converts, one that makes random ones.

A family says which stock class its network is, what its tensors are called there, and which role it plays; nothing
that a checkpoint brings as code is ever run. A newcomer writes one file with a `Family` and a plain forward, and adds
it to `FAMILIES` in `convert.py`.
"""

"""Settings of the whole suite."""

import torch

# Tiny networks gain nothing from threads, and on a busy machine threads spend their time waiting for each other.
torch.set_num_threads(1)

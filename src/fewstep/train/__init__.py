"""Trajectories, corruption, losses, objectives and the trainer."""

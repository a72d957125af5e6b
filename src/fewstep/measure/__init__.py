"""Measuring: tasks and their data, accuracy with intervals, timing, comparisons and plots."""

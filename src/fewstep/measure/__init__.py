"""Measuring: accuracy with intervals, timing, comparisons and plots."""

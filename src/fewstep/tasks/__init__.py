"""What is asked and what counts as right: problems by split, and how their answers are read and judged."""

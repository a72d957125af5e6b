"""What `fewstep.load` returns, its settings, and (later) captured steps."""

"""Task specifications: packaged offline tasks, one per module, and any task that lm-eval knows by name."""

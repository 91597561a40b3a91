"""Speed: what a model must compute and read, what this machine could do at best, and what was measured."""

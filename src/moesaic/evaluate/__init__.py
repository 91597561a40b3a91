"""Quality: perplexity on a held-out split, lm-eval tasks on the in-memory model, and what is derived per item."""

"""The sparse FFN: routing, partitions, scores, selections, combinations, experts and their executors."""

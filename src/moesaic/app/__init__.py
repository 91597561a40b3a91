"""The entry points: `moesaic` and `moesaic-report`, and the plan of one experiment."""

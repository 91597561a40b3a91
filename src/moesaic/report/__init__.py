"""From record files to tables, fronts and pictures. Reads files only; nothing here imports torch."""

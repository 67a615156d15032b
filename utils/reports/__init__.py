"""What is measured, and told of it: scores, logs, tables and pictures."""

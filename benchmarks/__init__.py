"""`python -m benchmarks …`: measurements whose tables and plots live in benchmarks/results/."""

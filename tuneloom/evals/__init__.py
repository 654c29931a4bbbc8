"""Score a base and a tuned model side by side."""

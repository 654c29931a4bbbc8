"""Drift, feedback, the decision to retrain."""

"""Hydra configuration, one primary YAML a verb; a package so that `pkg://tuneloom.conf` works."""

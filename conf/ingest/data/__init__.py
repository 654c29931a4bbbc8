"""Dataset recipes: one YAML a dataset, chosen with `tuneloom ingest data=NAME`."""

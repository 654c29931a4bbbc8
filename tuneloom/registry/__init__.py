"""Run records, digests, lineage. No torch here."""

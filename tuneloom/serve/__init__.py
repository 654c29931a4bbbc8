"""One base, many adapters."""

"""Raw records to versioned datasets, tokens and masks. No torch here."""

"""A fleet that is not there: simulated agents against a real broker."""

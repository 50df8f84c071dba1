"""Capacity: what is left on agents, who can take a request, and why the others cannot."""

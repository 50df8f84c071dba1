"""The agent: reads its host and publishes heartbeats. Needs no SQL and no web framework."""

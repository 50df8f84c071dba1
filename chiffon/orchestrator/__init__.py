"""The orchestrator: records heartbeats, judges silence, and answers planners."""

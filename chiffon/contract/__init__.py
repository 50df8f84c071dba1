"""The wire contract: messages, their encoding, the topology on the broker, and lease arithmetic."""

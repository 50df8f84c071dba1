"""The gateway: the same answers over HTTP, and the fleet page."""

"""What a process reports of itself: metrics for Prometheus, health, and their HTTP pages."""

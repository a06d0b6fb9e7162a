"""Contract tests over all services, and the whole at work."""

"""Scheduling: what can be booked, when it is free, and who has taken it."""

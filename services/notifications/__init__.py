"""Notifications: what is told to patients and staff, when, and what came of it."""

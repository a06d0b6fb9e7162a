"""Referrals: the loop from request to closed report, with a clock in every state."""

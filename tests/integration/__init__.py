"""The whole system at work: journeys, failures, traces."""

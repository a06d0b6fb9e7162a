"""Feedback: surveys, scores and what follows from them."""

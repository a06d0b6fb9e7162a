"""Receivers and servers that tests of every package share."""

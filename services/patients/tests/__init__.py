"""Tests of the patients service."""

"""Starts the real servers of the demo and of the tests."""

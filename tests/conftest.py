"""Shared by all tests: the peers' rule (see peers.py), and nothing of one family of tests alone."""

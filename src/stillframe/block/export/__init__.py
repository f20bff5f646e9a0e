"""Nodes served to other processes, over NBD."""

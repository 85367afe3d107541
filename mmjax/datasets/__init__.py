"""Data sets built from packages of the registry."""

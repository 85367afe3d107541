"""Objectives of tasks, by the name that a config gives."""

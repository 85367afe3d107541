"""Optimizers, their rules by parameter path, and what a task's gradient reaches."""

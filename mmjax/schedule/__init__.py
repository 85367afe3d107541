"""The schedule of tasks and of their shapes: pure functions of integers."""

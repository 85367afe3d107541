"""Which task runs at which step, in which shape: pure functions of integers."""

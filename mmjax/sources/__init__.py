"""Sources of examples, by the name that a config gives."""

"""Rules of a schedule, by the name that a config gives."""

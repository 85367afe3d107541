"""Compiled steps, state, checkpoints and input of a run; it knows tasks and no config of a whole run."""

"""Evaluators of a trained model, by the name that a config gives."""

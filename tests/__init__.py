"""The suite; a package, so that `python -m tests.pod.matrix` finds this folder and no installed `tests`."""

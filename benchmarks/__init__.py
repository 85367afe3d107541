"""Measurements: ratios of what runs interleaved in one process. `python -m benchmarks.run --help`.

Each module here is a case, but `run` and those with an underscore. A case is one file with one function,

    def measure(effort: Effort) -> list[Quantity]

whose docstring's first line states what it measures. Nothing lists the cases; `run` finds them.
"""

"""Compiling for chips that are not here. Where no TPU compiler is to be had, there is nothing to test."""

from __future__ import annotations

import platform

HAS_COMPILER = platform.system() == "Linux" and platform.machine() == "x86_64"
collect_ignore_glob = [] if HAS_COMPILER else ["test_*.py"]

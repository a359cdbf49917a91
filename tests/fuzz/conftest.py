"""Hypothesis profiles of the fuzz tests: the same few examples in every run, or many new ones on demand.

`DIPTYCH_FUZZ=long python -m pytest tests/fuzz` looks for what nobody has thought of; what it finds becomes
a unit test.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # strategies.py

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]

settings.register_profile(
    "ci", max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=SLOW
)
settings.register_profile(
    "long", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=SLOW
)
settings.load_profile(os.environ.get("DIPTYCH_FUZZ", "ci"))

"""Puts this folder on sys.path, from where ranks and workers import `parallel_targets`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

"""What tests have in common that is not a fixture."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository's root."""

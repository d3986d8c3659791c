"""Regenerates the golden prompts after a change that is meant:  python -m tests.models.golden"""

from tests.models.golden.cases import regenerate

regenerate()

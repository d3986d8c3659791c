"""`python -m kvcli.harness ...`: the command line of lm-eval with the model `kvcli` registered.

lm-eval finds models in its own package only (`lm_eval/models/__init__.py`: MODEL_MAPPING) and has no entry points, so
the module that registers one must be imported before its command runs.
"""

from __future__ import annotations

import argparse
import os

from kvcli.errors import KvcliError
from kvcli.evals.harness import package


def main() -> None:
    """Raises SystemExit 2 with one message for what kvcli refuses."""
    try:
        package.version()
        from lm_eval.__main__ import cli_evaluate

        import kvcli.harness.model  # noqa: F401 - registers it

        cli_evaluate()
    except KvcliError as e:
        if os.environ.get("KVCLI_DEBUG") == "1":
            raise
        argparse.ArgumentParser().exit(int(e.code), "\n".join(e.lines()) + "\n")


if __name__ == "__main__":
    main()

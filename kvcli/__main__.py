"""python -m kvcli"""

import sys

from kvcli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())

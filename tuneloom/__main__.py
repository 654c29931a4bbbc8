"""`python -m tuneloom VERB ...`, the same as the console command `tuneloom`."""

import sys

from tuneloom.cli import main

if __name__ == "__main__":
    sys.exit(main())

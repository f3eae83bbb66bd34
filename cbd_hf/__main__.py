"""`python -m cbd_hf` is `cbd`."""

import sys

from cbd_hf.cli import main


if __name__ == "__main__":
    sys.exit(main())

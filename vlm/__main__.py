"""`python -m vlm ...` and `accelerate launch -m vlm ...`."""

import sys

from vlm.cli import main

if __name__ == "__main__":
    sys.exit(main())

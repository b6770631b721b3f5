"""``python -m cuflash``: what this machine can run, and how fast."""

from __future__ import annotations

import sys

from cuflash._cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m finetuned_daemon`: the same as `finetuned`."""

from __future__ import annotations

import sys

from finetuned_daemon.entry import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m finetuned.cli`: the same as `finetunectl`."""

from __future__ import annotations

from finetuned.cli import main

if __name__ == "__main__":
    main()

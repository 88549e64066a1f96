"""Runs the `sd-progress` command as `python -m sd_progress`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())

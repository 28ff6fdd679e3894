"""``python -m feste``: the command line."""

from feste.cli import main

raise SystemExit(main())

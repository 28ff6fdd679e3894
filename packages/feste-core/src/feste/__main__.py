"""Run the command line as ``python -m feste``."""

from feste.cli import main

raise SystemExit(main())

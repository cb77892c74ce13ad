"""``python -m pyrnode``."""

from pyrnode.cli import main

raise SystemExit(main())

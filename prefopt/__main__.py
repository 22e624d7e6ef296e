"""`python -m prefopt` is `prefopt`."""

from prefopt.cli import main

raise SystemExit(main())

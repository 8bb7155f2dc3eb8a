"""`python -m modelport`: the command, for when its script is not on the PATH."""

from modelport.cli import main

raise SystemExit(main())

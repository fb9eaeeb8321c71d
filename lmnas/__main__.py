"""`python -m lmnas`: the command line."""

import sys

from lmnas.cli.main import main

sys.exit(main())

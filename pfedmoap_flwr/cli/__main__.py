"""`python -m pfedmoap_flwr.cli` is the command `pfedmoap`."""

import sys

from pfedmoap_flwr.cli.main import main

sys.exit(main())

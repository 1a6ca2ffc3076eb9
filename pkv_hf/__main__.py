"""`python -m pkv_hf` is the `pkv-hf` command."""

from pkv_hf.cli import main

raise SystemExit(main())

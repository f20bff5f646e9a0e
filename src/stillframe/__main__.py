"""`python -m stillframe` is `stillframe`."""

from stillframe.cli.main import main

main()

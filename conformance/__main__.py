"""`python -m conformance`: the commands of the kit."""

from conformance.commands import main

main()

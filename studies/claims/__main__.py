"""`python -m studies.claims`. Processes that are spawned do not find the functions of this file, so it has none."""

from studies.claims.run import main

main()

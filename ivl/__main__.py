"""`python -m ivl`, which is how torchrun starts it: torchrun --nproc-per-node 2 -m ivl train RECIPE."""

from ivl.cli import main

if __name__ == "__main__":
    main()

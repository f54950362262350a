"""`python -m examples.quickstart`, from the repository's root."""

from examples.quickstart.run import main

if __name__ == "__main__":
    main()

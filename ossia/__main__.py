"""`python -m ossia` is the `ossia` command."""

from ossia.cli import main

if __name__ == "__main__":
    main()

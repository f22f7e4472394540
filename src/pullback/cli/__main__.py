"""`python -m pullback.cli`."""

from pullback.cli.main import main

if __name__ == "__main__":
    main()

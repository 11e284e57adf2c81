"""python -m handtuned: the same as the handtuned command."""

from .cli import main

if __name__ == "__main__":
    main()

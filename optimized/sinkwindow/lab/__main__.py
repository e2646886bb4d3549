"""`python -m sinkwindow.lab`."""

from sinkwindow.lab.cli import main

if __name__ == "__main__":
    main()

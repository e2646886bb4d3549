"""`python -m sinkwindow_lab`."""

from sinkwindow_lab.cli import main

if __name__ == "__main__":
    main()

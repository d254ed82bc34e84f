"""`python -m isofusion`: the command line."""

from isofusion.cli.main import main

if __name__ == "__main__":
    main()

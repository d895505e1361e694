"""`python -m meadow` is the same as `meadow`."""

from meadow.experiments.command import main

if __name__ == "__main__":
    main()

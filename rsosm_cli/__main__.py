"""``python -m rsosm_cli`` is ``rsosm``."""

from rsosm_cli.app import main

if __name__ == "__main__":
    main()

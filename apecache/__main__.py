"""`python -m apecache`: the same as the command `apecache`, found through its entry point."""

from importlib.metadata import entry_points

if __name__ == "__main__":
    (script,) = entry_points(group="console_scripts", name="apecache")
    script.load()()

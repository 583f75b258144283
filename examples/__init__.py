"""Small, complete programs: `python -m examples.NAME`."""

"""What `make machrun` needs, fetched and built: `python -m machrun.setup`."""

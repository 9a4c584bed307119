"""Every command that makes, fetches or converts data: `python -m data.prepare.NAME --help`."""

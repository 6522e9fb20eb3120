"""All that half an hour on a machine with a GPU should find out; see `command`."""

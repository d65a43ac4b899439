"""Where the parts of each supported model are."""

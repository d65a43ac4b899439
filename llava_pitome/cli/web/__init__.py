"""A web page that answers questions about images, with and without merging, and shows what merged."""

"""A web page on which a LLaVA answers about pictures, with and without merging, and shows what merged."""

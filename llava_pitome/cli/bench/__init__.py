"""What merging costs and saves on the clock: `llava-pitome bench`."""

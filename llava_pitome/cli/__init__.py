"""The commands of `llava-pitome`, one folder or file each."""

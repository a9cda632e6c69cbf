"""The forms of rows, one file each, and what they become."""

"""Row formats of preference data, one file each, and the record that they become."""

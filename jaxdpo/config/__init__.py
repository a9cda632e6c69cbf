"""Options: the schema, reading them from files and arguments, and the rules between them."""

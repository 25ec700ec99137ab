"""What no single field of a recipe can know, one subject a file; each `check` yields (where, message) pairs."""

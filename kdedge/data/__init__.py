"""The data shelf. Importing it costs nothing: `catalog` needs no numpy, `load` and `splits` no torch."""

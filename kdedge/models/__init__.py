"""The shelf of networks: families of backbones, one a file, and the one way to put them together."""

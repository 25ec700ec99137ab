"""Torch modules and arrays in, ONNX files out. Knows nothing of recipes and runs, and never imports kdedge."""

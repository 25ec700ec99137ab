"""Quantization that is part of training: what a layer takes and its weights are rounded as the deployed integers will be."""

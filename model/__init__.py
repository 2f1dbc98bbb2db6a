"""Encoder, decoder, heads, losses, and one small file per pre-training method."""

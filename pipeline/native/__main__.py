"""`python -m pipeline.native` compiles the decoder and says where it is, or why there is none (exit code 5)."""

import sys

from pipeline import native

reason = native.why_not()
print(f"region decoder: {native.built()}" if reason is None else f"no region decoder: {reason}")
sys.exit(0 if reason is None else 5)

"""Compiling CUDA C++ at first use. Knows nothing of attention."""
